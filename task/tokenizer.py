"""A tokenizer in processes of its own, so that its rules can harm only the record that they are applied to.

The tokenizer of a package was written by the model's owner, who could use it to distinguish some texts from others: by
a crash, by endless use of memory or time, by a chat template, which is a program, or by the files that a tokenizer's
settings name. So only tokenizer.json, the names of a few special tokens and the chat template are read from a model's
folder, and a text influences nothing but its own ids; see `task.tokenizer_worker`.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.errors import DataError
from offsite.task.tokenizer_worker import CPU_SECONDS, Outcomes, TokenizerWorker

log = logging.getLogger("offsite.task")
MAX_BYTES = 1 << 28
IDS_PER_BYTE, SPARE_IDS = 32, 1024  # no honest tokenizer makes more ids from a text; a longer result is dropped
_NONE = 0xFFFFFFFF
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")  # tokens that a chat template may write
# For the site's log alone: the numbers follow from the records.
_SLOW = (
    "tokenizer: a record was stopped at its limit of time; %d records may take %d s of CPU each, and long ones more; "
    "stop the job by hand if that is too long"
)
_TOLD = "tokenizer: stopped at the limit of time on %d and failed on %d of %d records; each of them is empty"


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
            with TokenizerWorker(self._start) as worker:
                facts = worker.facts
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

    def tokens(self, texts: Sequence[str], length: int | None = None) -> list[list[int]]:
        """Returns each text's ids without special tokens; an empty list where the tokenizer fails or takes too long.

        Args:
          texts: any texts.
          length: number of ids to keep of each text; None to keep all.
        """
        asked: list[dict[str, Any]] = [{"kind": "text", "of": text, "length": length} for text in texts]
        return self._answers(asked, [_most(text) if length is None else length for text in texts])

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
        columns = [_columns(words, 2, length) for words in self._answers(asked, [2 * length] * len(asked))]
        return [(ids, [int(flag == 1) for flag in flags]) for ids, flags in columns]

    def _encodings(self, kind: str, pieces: Sequence[Any], length: int) -> list[Encoding]:
        asked = [{"kind": kind, "of": piece, "length": length} for piece in pieces]
        return [Encoding(*_columns(words, 6, length)) for words in self._answers(asked, [6 * length] * len(asked))]

    def _answers(self, requests: Sequence[dict[str, Any]], most: Sequence[int]) -> list[list[int]]:
        """Returns at most so many numbers for each request; an empty list where the tokenizer fails on that request.

        Raises:
          DataError: the tokenizer's process cannot be started; no request has a part in that.
        """
        outcomes, answers = Outcomes(), list[list[int]]()
        try:
            with TokenizerWorker(self._start) as worker:
                for request, room in zip(requests, most, strict=True):
                    numbers, outcome = worker.ask(request, room)
                    if outcomes.count(outcome) == 1:
                        log.warning(_SLOW, len(requests), CPU_SECONDS)
                    answers.append(numbers)
        except (OSError, EOFError, ValueError) as error:
            raise DataError("tokenizer: its process cannot be started now; free memory or processes") from error
        if outcomes.failed or outcomes.stopped:
            log.warning(_TOLD, outcomes.stopped, outcomes.failed, len(requests))
        return answers


def _most(text: str) -> int:
    """Returns the number of ids that an honest tokenizer makes of a text at most."""
    return IDS_PER_BYTE * len(text.encode("utf-8", "surrogatepass")) + SPARE_IDS


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
