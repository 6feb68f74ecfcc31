"""A tokenizer that works in a process of its own: what its rules do to a text ends there, also when they kill it.

A package's tokenizer was written by the model's owner, who could have written it to tell some texts from others: by a
fault, by memory without end, or by the files that a tokenizer's settings name. So of a model's folder only
tokenizer.json and the name of the end-of-text token are read, and no text makes a difference but in its own ids.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import DataError

START_SECONDS, TEXT_SECONDS, BYTES_PER_SECOND = 60.0, 10.0, 50_000
WASTED_SECONDS = 600.0  # spent on texts that came to nothing; the rest is given up then
MOST_BYTES = 1 << 28
_PROGRAM = Path(__file__).with_name("tokenizer_process.py")


class Tokenizer:
    """The tokenizer of a model's folder.

    Args:
      content: bytes of its tokenizer.json.
      eos: the token that ends a text, or None.

    Attributes:
      eos_token_id: of that token; None where there is none.
      largest_id: of its vocabulary.

    Raises:
      DataError: it is none, or the library fails on it.
    """

    def __init__(self, content: bytes, eos: str | None) -> None:
        self._content, self._eos = content, (eos or "").encode()
        try:
            with _Process(self._content, self._eos) as process:
                facts = json.loads(process.facts)
        except (OSError, EOFError, ValueError) as error:
            raise DataError("tokenizer.json cannot be read; save it again with a fast tokenizer") from error
        self.eos_token_id: int | None = facts["eos"]
        self.largest_id = int(facts["largest"])

    @classmethod
    def of(cls, folder: Path) -> "Tokenizer":
        """Reads the tokenizer of a folder.

        Raises:
          DataError: it has none, or one that is no fast tokenizer.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(
                f"tokenizer={folder.name!r} has no tokenizer.json; copy the model's tokenizer files there, or save it "
                "again with a fast tokenizer"
            )
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"tokenizer={folder.name!r}: tokenizer.json has over {MOST_BYTES} bytes; no tokenizer has")
        return cls(path.read_bytes(), _end_of_text(folder))

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns each text's ids without special tokens; none for one on which it fails, takes too long, or dies."""
        with contextlib.ExitStack() as stack:
            process, wasted, found = None, 0.0, list[list[int]]()
            for text in texts:
                began, ids = time.monotonic(), None
                if wasted < WASTED_SECONDS:
                    with contextlib.suppress(OSError, EOFError):
                        process = process or stack.enter_context(_Process(self._content, self._eos))
                        ids = process.ids(text)
                if ids is None:
                    stack.close()
                    process, wasted = None, wasted + time.monotonic() - began
                found.append(ids or [])
        return found


class _Process:
    """One running tokenizer; a context manager.

    Raises:
      OSError, EOFError: it died, or took too long.
    """

    def __init__(self, content: bytes, eos: bytes) -> None:
        self._content, self._eos = content, eos

    def __enter__(self) -> "_Process":
        self._process = subprocess.Popen(  # noqa: S603 - our own file
            [sys.executable, "-I", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a panic quotes what it was at
            env={"TOKENIZERS_PARALLELISM": "false"},
            bufsize=0,
        )
        self._selector = selectors.DefaultSelector()
        try:
            self._selector.register(self._output, selectors.EVENT_READ)
            self._write(self._content)
            self._write(self._eos)
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

    def ids(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        content = text.encode("utf-8", "surrogatepass")
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


def _end_of_text(folder: Path) -> str | None:
    """Returns the end-of-text token that the settings name; nothing else of them is looked at."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"tokenizer={folder.name!r} has a damaged {name}; save it again") from error
        token = content.get("eos_token") if isinstance(content, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None
