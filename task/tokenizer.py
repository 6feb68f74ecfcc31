"""A tokenizer in processes of its own, so that its rules can harm only the record that they are applied to.

The tokenizer of a package was written by the model's owner, who could use it to distinguish some texts from others: by
a crash, by endless use of memory or time, by a chat template, which is a program, or by the files that a tokenizer's
settings name. So only tokenizer.json, a few values of the settings and the chat template are read from a model's folder
(`task.tokenizer_settings`), and a text influences nothing but its own ids; see `task.tokenizer_worker`.
"""

import copy
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.errors import DataError
from offsite.task.tokenizer_settings import DATE, ELSEWHERE, TEMPLATE, TokenizerSettings
from offsite.task.tokenizer_worker import CPU_SECONDS, Outcomes, TokenizerWorker

log = logging.getLogger("offsite.task")
MAX_BYTES = 1 << 28
IDS_PER_BYTE, SPARE_IDS = 32, 1024  # no honest tokenizer makes more ids from a text; a longer result is dropped
_CHARACTERS_PER_ID = 256  # no token of a known tokenizer is longer
_NONE = 0xFFFFFFFF
HIDES_ANSWERS = 0  # the answer of `tokenizer_process` about such a template
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character in UTF-16: JSON can hold it, no other encoding can
# For the site's log alone: the numbers follow from the records.
_SLOW = (
    "tokenizer: a record was stopped at its limit of time; %d records may take %d s of CPU each, and long ones more; "
    "stop the job by hand if that is too long"
)
_NOT_STARTED = (
    "tokenizer: its process cannot be started now ({}); free memory or processes, and let this user run Python"
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
      settings: settings beside tokenizer.json.

    Attributes:
      eos_token_id: id of the token that ends a text, or None.
      largest_id: largest token id of the vocabulary.
      start: ids that the tokenizer's own rule puts in front of a text, such as the token of its beginning.
      end: ids that the tokenizer's own rule puts behind a text.
      has_template: whether the tokenizer has a chat template, and so takes conversations.
      template: the chat template; empty without one.

    Raises:
      DataError: the content is not a tokenizer, or a library fails on it or on the chat template.
    """

    def __init__(self, content: bytes, settings: TokenizerSettings) -> None:
        self._frames, self._silent = (content, settings.to_bytes()), False
        self._settings = settings
        self.template = settings.template
        self.has_template = bool(settings.template)
        try:
            with TokenizerWorker(self._frames) as worker:
                facts = worker.facts
            self.eos_token_id: int | None = facts["eos"]
            self.largest_id = int(facts["largest"])
            self.start, self.end = _ids(facts["start"]), _ids(facts["end"])
            self._unnamed = [str(token) for token in facts["unnamed"]]
        except (EOFError, TimeoutError, ConnectionError, ValueError, KeyError, TypeError) as error:
            files = "tokenizer.json or its chat template" if self.has_template else "tokenizer.json"
            raise DataError(
                f"{files} cannot be read, or tokenizer_config.json names a language that tokenizer.json lacks; save the"
                " model's tokenizer again with a fast tokenizer"
            ) from error
        except OSError as error:
            raise DataError(_NOT_STARTED.format(error.strerror)) from error

    @classmethod
    def of(cls, folder: Path, *, with_images: bool = False) -> "Tokenizer":
        """Reads the tokenizer of a folder; `with_images` as for `TokenizerSettings.of`.

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
        return cls(path.read_bytes(), TokenizerSettings.of(folder, with_images=with_images))

    def silenced(self) -> "Tokenizer":
        """Returns a copy that makes no token of any text and starts no process, for a task that only checks records."""
        silent = copy.copy(self)
        silent._silent = True
        return silent

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

    def targets(self, texts: Sequence[str], length: int) -> list[Encoding]:
        """Returns each target of a translation or a summary with special tokens, as `singles`, marked as a target.

        Raises:
          DataError: the tokenizer adds a language code, and the settings do not name both languages, or the place of
            the code is not known.
        """
        settings = self._settings
        if settings.code_place == ELSEWHERE:
            raise DataError(
                "tokenizer_class: this class marks the languages of source and target in a way of its own, not known "
                "here; take an mBART, mBART-50 or NLLB, or a model without language codes such as T5"
            )
        if settings.code_place and not (settings.source_language and settings.target_language):
            raise DataError(
                f"src_lang={settings.source_language!r} tgt_lang={settings.target_language!r}: tokenizer_config.json "
                "must name both languages, because this tokenizer marks each text with the code of its language; write "
                'for example "src_lang": "en_XX", "tgt_lang": "de_DE"'
            )
        if self._unnamed and not settings.code_place:
            raise DataError(
                f"token={self._unnamed[0]!r}: tokenizer.json adds this token to every text, and tokenizer_config.json "
                "does not name the token, so it may be the code of the source's language; name it, for example as "
                "eos_token, or save the tokenizer with the class of its model, src_lang and tgt_lang"
            )
        return self._encodings("target", list(texts), length)

    def pairs(self, pairs: Sequence[tuple[str, str]], length: int) -> list[Encoding]:
        """Returns each pair with special tokens, the second text cut so that both fit; empty if the tokenizer fails."""
        return self._encodings("pair", [list(pair) for pair in pairs], length)

    def whole_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoding]:
        """Returns each pair with special tokens, uncut; an empty encoding where the tokenizer fails."""
        most = [_most(first) + _most(second) for first, second in pairs]
        asked = [{"kind": "pair", "of": list(pair), "length": room} for pair, room in zip(pairs, most, strict=True)]
        answers = self._answers(asked, [6 * room for room in most])
        return [Encoding(*_columns(words, 6, room)) for words, room in zip(answers, most, strict=True)]

    def worded(self, lists: Sequence[Sequence[str]], length: int) -> list[Encoding]:
        """Returns each list of words with special tokens, cut to a length; empty where the tokenizer fails."""
        return self._encodings("words", [list(words) for words in lists], length)

    def chats(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], length: int, *, special: bool = False
    ) -> list[tuple[list[int], list[int]]]:
        """Returns each conversation's ids through the chat template, and 1 for each token of an answer, else 0.

        Args:
          conversations: messages as JSON.
          length: number of ids to keep of each conversation.
          special: whether the tokenizer adds its special tokens unless the template begins with them, as transformers'
            processors of images and texts do; a tokenizer's own template writes them itself.

        Raises:
          DataError: the folder has no chat template, or not the date that the template asks for, or the template does
            not show where an answer begins.
        """
        self._check_template()
        asked = [_asked("chat", talk, length, special=special) for talk in conversations]
        columns = [_columns(words, 2, length) for words in self._answers(asked, [2 * length] * len(asked))]
        return [(ids, [int(flag == 1) for flag in flags]) for ids, flags in columns]

    def prompts(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], length: int, *, special: bool = False
    ) -> list[list[int]]:
        """Returns each conversation's ids with the template's prompt for an answer; arguments and errors as `chats`."""
        self._check_template()
        asked = [_asked("prompt", talk, length, special=special) for talk in conversations]
        return self._answers(asked, [length] * len(asked))

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Returns the text of each list of ids, without special tokens; an empty text where the tokenizer fails."""
        asked: list[dict[str, Any]] = [{"kind": "ids", "of": list(ids)} for ids in rows]
        codes = self._answers(asked, [_CHARACTERS_PER_ID * len(ids) + SPARE_IDS for ids in rows])
        return ["".join(chr(code) if code <= sys.maxunicode else "\ufffd" for code in own) for own in codes]

    def _check_template(self) -> None:
        """Refuses a folder through whose template no conversation can be learnt; no record has a part in that."""
        if names := self._settings.template_names:
            raise DataError(
                f"tokenizer has chat templates {list(names)}, but none is named 'default'; save the right template as "
                f"{TEMPLATE} in the model's folder"
            )
        if not self.has_template:
            raise DataError(
                f"tokenizer has no chat template; add {TEMPLATE} to the model's folder, or take the task "
                "prompt_completion"
            )
        if "strftime_now" in self.template and not self._settings.date:
            raise DataError(
                f'the chat template asks for the date (strftime_now); write "{DATE}": "2026-12-01" or another day '
                "into tokenizer_config.json, so that a record has the same tokens every day"
            )
        (outcome,) = self._answers([{"kind": "template"}], [1])
        if outcome == [HIDES_ANSWERS]:
            raise DataError(
                "the chat template's prompt (add_generation_prompt) is not how the template begins an answer, so no "
                "answer can be learnt; correct the template, or take the task prompt_completion"
            )

    def _encodings(self, kind: str, pieces: Sequence[Any], length: int) -> list[Encoding]:
        asked = [{"kind": kind, "of": piece, "length": length} for piece in pieces]
        return [Encoding(*_columns(words, 6, length)) for words in self._answers(asked, [6 * length] * len(asked))]

    def _answers(self, requests: Sequence[dict[str, Any]], most: Sequence[int]) -> list[list[int]]:
        """Returns at most so many numbers for each request; an empty list where the tokenizer fails on that request.

        Raises:
          DataError: the tokenizer's process cannot be started; no request has a part in that.
        """
        outcomes, answers = Outcomes(), list[list[int]]()
        if self._silent:
            return [[] for _ in requests]
        try:
            with TokenizerWorker(self._frames) as worker:
                for request, room in zip(requests, most, strict=True):
                    numbers, outcome = worker.ask(_well_formed(request), room)
                    if outcomes.count(outcome) == 1:
                        log.warning(_SLOW, len(requests), CPU_SECONDS)
                    answers.append(numbers)
        except (OSError, EOFError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "no answer"
            raise DataError(_NOT_STARTED.format(reason)) from error
        if outcomes.failed or outcomes.stopped:
            log.warning(_TOLD, outcomes.stopped, outcomes.failed, len(requests))
        return answers


def _asked(kind: str, talk: Sequence[Mapping[str, Any]], length: int, *, special: bool) -> dict[str, Any]:
    return {"kind": kind, "of": [dict(message) for message in talk], "length": length, "special": special}


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


def _ids(numbers: Sequence[int]) -> list[int]:
    """Returns the ids around a text, which foreign rules chose; raises ValueError for numbers that are no ids."""
    if not all(type(number) is int and 0 <= number < _NONE for number in numbers):
        raise ValueError("ids must be whole numbers")
    return list(numbers)


def _well_formed(value: Any) -> Any:
    """Returns JSON content in which every lone surrogate is U+FFFD; no tokenizer takes half a character."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {_well_formed(key): _well_formed(part) for key, part in value.items()}
    return [_well_formed(part) for part in value] if isinstance(value, list | tuple) else value
