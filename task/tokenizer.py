"""A tokenizer in a process of its own, so that its rules can harm only that process, even if they kill it.

The tokenizer of a package was written by the model's owner, who could use it to distinguish some texts from others: by
a crash, by endless use of memory, by a chat template, which is a program, or by the files that a tokenizer's settings
name. So only tokenizer.json, the names of a few special tokens and the chat template are read from a model's folder,
and a text influences nothing but its own ids.
"""

import contextlib
import json
import os
import selectors
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.errors import DataError

START_SECONDS, TEXT_SECONDS, BYTES_PER_SECOND = 60.0, 10.0, 50_000
WASTED_SECONDS = 600.0  # limit of the time for texts on which the tokenizer fails; later texts are then not tried
MAX_BYTES = 1 << 28
_PROGRAM = Path(__file__).with_name("tokenizer_process.py")
_NONE = 0xFFFFFFFF
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")  # tokens that a chat template may write


@dataclass(frozen=True)
class Encoding:
    """The encoding of a text, a pair or a list of words: lists of one length, all empty where the tokenizer failed.

    Attributes:
      ids: token ids, including special tokens.
      types: segment of each token, 0 or 1, as the tokenizer numbers them.
      sequences: index of each token's text in a pair, 0 or 1; -1 for a special token.
      words: index of each token's word; -1 for a special token.
      starts, ends: range of each token's characters in its own text, or in its own word.
    """

    ids: list[int]
    types: list[int]
    sequences: list[int]
    words: list[int]
    starts: list[int]
    ends: list[int]


class Tokenizer:
    """The tokenizer of a model's folder.

    Args:
      content: bytes of tokenizer.json.
      eos: the token that ends a text, or None.
      template: the chat template, or None.
      special: tokens that the template may write, by their names in the settings.

    Attributes:
      eos_token_id: id of the token that ends a text, or None.
      largest_id: largest token id of the vocabulary.
      has_template: whether the tokenizer has a chat template, and so takes conversations.

    Raises:
      DataError: the content is not a tokenizer, or a library fails on it or on the chat template.
    """

    def __init__(
        self, content: bytes, eos: str | None, template: str | None = None, special: Mapping[str, str] | None = None
    ) -> None:
        chat = json.dumps({"template": template, "tokens": dict(special or {})}) if template else ""
        self._start = (content, (eos or "").encode(), chat.encode())
        self.has_template = bool(template)
        try:
            with _Process(self._start) as process:
                facts = json.loads(process.facts)
        except (OSError, EOFError, ValueError) as error:
            files = "tokenizer.json or its chat template" if template else "tokenizer.json"
            raise DataError(f"{files} cannot be read; save it again with a fast tokenizer") from error
        self.eos_token_id: int | None = facts["eos"]
        self.largest_id = int(facts["largest"])

    @classmethod
    def of(cls, folder: Path) -> "Tokenizer":
        """Reads the tokenizer of a folder.

        Raises:
          DataError: the folder has no tokenizer, or a tokenizer that is not a fast tokenizer.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(
                f"tokenizer={folder.name!r} has no tokenizer.json; copy the model's tokenizer files there, or save it "
                "again with a fast tokenizer"
            )
        if path.stat().st_size > MAX_BYTES:
            raise DataError(
                f"tokenizer={folder.name!r}: tokenizer.json must have at most {MAX_BYTES} bytes; copy it again"
            )
        special = _special_tokens(folder)
        return cls(path.read_bytes(), special.get("eos_token"), _chat_template(folder), special)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns each text's ids without special tokens; an empty list where the tokenizer fails or takes too long."""
        return self._answers([{"kind": "text", "of": text} for text in texts])

    def singles(self, texts: Sequence[str], length: int) -> list[Encoding]:
        """Returns each text with special tokens, cut to a length; an empty encoding where the tokenizer fails."""
        return self._encodings("single", list(texts), length)

    def pairs(self, pairs: Sequence[tuple[str, str]], length: int) -> list[Encoding]:
        """Returns each pair with special tokens, the second text cut so that both fit; empty if the tokenizer fails."""
        return self._encodings("pair", [list(pair) for pair in pairs], length)

    def worded(self, lists: Sequence[Sequence[str]], length: int) -> list[Encoding]:
        """Returns each list of words with special tokens, cut to a length; empty where the tokenizer fails."""
        return self._encodings("words", [list(words) for words in lists], length)

    def chats(
        self, conversations: Sequence[Sequence[Mapping[str, str]]], length: int
    ) -> list[tuple[list[int], list[int]]]:
        """Returns each conversation's ids through the chat template, and 1 for each token of an answer, else 0.

        Raises:
          DataError: the folder has no chat template.
        """
        if not self.has_template:
            raise DataError(
                "tokenizer has no chat template; add chat_template.jinja to the model's folder, or take the task "
                "prompt_completion"
            )
        asked = [
            {"kind": "chat", "of": [dict(message) for message in talk], "length": length} for talk in conversations
        ]
        columns = [_columns(words, 2, length) for words in self._answers(asked)]
        return [(ids, [int(flag == 1) for flag in flags]) for ids, flags in columns]

    def _encodings(self, kind: str, pieces: Sequence[Any], length: int) -> list[Encoding]:
        answers = self._answers([{"kind": kind, "of": piece, "length": length} for piece in pieces])
        return [Encoding(*_columns(words, 6, length)) for words in answers]

    def _answers(self, requests: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Returns the numbers of each answer; an empty list where the process fails, takes too long, or dies."""
        with contextlib.ExitStack() as stack:
            process, wasted, answers = None, 0.0, list[list[int]]()
            for request in requests:
                began, numbers = time.monotonic(), None
                if wasted < WASTED_SECONDS:
                    with contextlib.suppress(OSError, EOFError):
                        process = process or stack.enter_context(_Process(self._start))
                        numbers = process.ask(request)
                if numbers is None:
                    stack.close()
                    process, wasted = None, wasted + time.monotonic() - began
                answers.append(numbers or [])
        return answers


class _Process:
    """One running tokenizer process; a context manager.

    Raises:
      OSError, EOFError: the process died, or took too long.
    """

    def __init__(self, start: Sequence[bytes]) -> None:
        self._start = start

    def __enter__(self) -> "_Process":
        self._process = subprocess.Popen(  # noqa: S603 - our own file
            [sys.executable, "-I", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a panic's message quotes the text
            env={"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
            bufsize=0,
        )
        self._selector = selectors.DefaultSelector()
        try:
            self._selector.register(self._output, selectors.EVENT_READ)
            for frame in self._start:
                self._write(frame)
            self.facts = self._read(START_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()

    def ask(self, request: dict[str, Any]) -> list[int]:
        """Returns the numbers that the process answers to a request."""
        content = json.dumps(request).encode()
        self._write(content)
        words = array("I", self._read(TEXT_SECONDS + len(content) / BYTES_PER_SECOND))
        if sys.byteorder == "big":
            words.byteswap()
        return words.tolist()

    @property
    def _output(self) -> Any:
        return self._process.stdout

    def _write(self, content: bytes) -> None:
        pipe: Any = self._process.stdin
        left = memoryview(struct.pack("<I", len(content)) + content)
        while left:
            left = left[pipe.write(left) :]

    def _read(self, seconds: float) -> bytes:
        until = time.monotonic() + seconds
        (size,) = struct.unpack("<I", self._take(4, until))
        return self._take(size, until)

    def _take(self, size: int, until: float) -> bytes:
        taken = bytearray()
        while len(taken) < size:
            if not self._selector.select(max(until - time.monotonic(), 0)):
                raise TimeoutError(f"tokenizer: no answer within {TEXT_SECONDS:g} s")
            piece = os.read(self._output.fileno(), min(size - len(taken), 1 << 20))
            if not piece:
                raise EOFError("tokenizer: its process has ended")
            taken += piece
        return bytes(taken)


def _columns(words: list[int], count: int, length: int) -> list[list[int]]:
    """Returns numbers as `count` columns of at most `length` numbers each; empty columns where the numbers do not fit.

    The numbers come from a process that runs foreign rules, so a wrong number may cause wrong tokens, but nothing else.
    """
    size, rest = divmod(len(words), count)
    if rest or size > length:
        return [[] for _ in range(count)]
    return [[-1 if word == _NONE else word for word in words[at * size : (at + 1) * size]] for at in range(count)]


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """Returns the content of a JSON file in the folder; an empty dictionary for a missing file."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"tokenizer={folder.name!r} has a damaged {name}; save it again") from error
    return content if isinstance(content, dict) else {}


def _special_tokens(folder: Path) -> dict[str, str]:
    """Returns the special tokens that the settings name; apart from the chat template, no other setting is read."""
    tokens: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = _settings(folder, name)
        for kind in _SPECIAL:
            token = settings.get(kind)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens.setdefault(kind, token)
    return tokens


def _chat_template(folder: Path) -> str | None:
    """Returns the chat template of a folder, from the files in which transformers stores it, or None."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"tokenizer={folder.name!r} has a damaged {path.name}; save it again") from error
    template = _settings(folder, "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None
