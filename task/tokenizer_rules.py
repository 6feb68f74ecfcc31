"""A tokenizer with the rules of its settings, as transformers applies them, and the encodings that it answers with.

A part of the tokenizer's program (`tokenizer_process`), which loads this file by its path; so nothing of this package
is imported here.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

NONE = 0xFFFFFFFF
Columns = tuple[Iterable[int], ...]
_PROBES = ("a", "the", "river", "x", "1")  # words by which a tokenizer shows whether it knows words by their spaces


class Rules:
    """A tokenizer and its settings.

    Args:
      content: text of tokenizer.json.
      settings: settings as `task.tokenizer_settings` writes them.

    Raises:
      ValueError: the settings name a token that is not in tokenizer.json; or any error of the library.
    """

    def __init__(self, content: str, settings: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer, pre_tokenizers

        self._settings = settings
        self._tokenizer: Any = Tokenizer.from_str(content)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = settings["split_special"]
        old = self._tokenizer.pre_tokenizer
        if isinstance(old, pre_tokenizers.ByteLevel) and settings["prefix_space"] is not None:
            space = settings["prefix_space"]
            self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(space, use_regex=old.use_regex)
        self._source, self._target = self._around_texts()
        self._tokenizer.post_processor = self._source
        self._added = tuple(token.content for token in self._tokenizer.get_added_tokens_decoder().values())
        self._spaced = False
        with contextlib.suppress(BaseException):  # the library must import numpy before a record's process may not
            self._tokenizer.encode(["a"], is_pretokenized=True)
            self._spaced = any(self._needs_space(word) for word in _PROBES)

    def facts(self) -> dict[str, Any]:
        """Returns what the parent process knows of the tokenizer; see `task.tokenizer.Tokenizer`."""
        start, end = around(self._source)
        eos = self._settings["tokens"].get("eos_token")
        number = self._settings["eos_id"]
        known = number is not None and self._tokenizer.id_to_token(number) is not None
        return {
            "eos": self._tokenizer.token_to_id(eos) if eos else number if known else None,
            "largest": max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0),
            "start": start,
            "end": end,
            "unnamed": self._unnamed([*start, *end]),
        }

    def plain(self, request: Mapping[str, Any]) -> Columns:
        """Returns the ids of a text, without special tokens; the first ids where the request has a length."""
        self._tokenizer.no_truncation()
        return (self._tokenizer.encode(request["of"], add_special_tokens=False).ids[: request["length"]],)

    def full(self, request: Mapping[str, Any]) -> Columns:
        """Returns six columns of a text, a target, a pair of texts or a list of words, with special tokens, cut."""
        of, kind, length = request["of"], request["kind"], request["length"]
        if kind == "target":  # the process ends after this request
            self._tokenizer.post_processor = self._target
        self._tokenizer.enable_truncation(length, strategy="only_second" if kind == "pair" else "longest_first")
        if kind == "words":
            return self._words(of)
        return _columns(self._tokenizer.encode(*of) if kind == "pair" else self._tokenizer.encode(of))

    def text(self, ids: Iterable[int]) -> str:
        """Returns the text of ids without special tokens; a token that the settings name is one, as in transformers."""
        named = {self._tokenizer.token_to_id(token) for token in self._settings["tokens"].values()}
        return str(self._tokenizer.decode([number for number in ids if number not in named], skip_special_tokens=True))

    def rendered(self, text: str, *, special: bool) -> Any:
        """Returns the encoding of a rendered conversation.

        Special tokens are added unless the template wrote bos_token, as by transformers' processors of images and text.
        """
        bos = self._settings["tokens"].get("bos_token")
        added = special and not (bos and text.startswith(bos))
        self._tokenizer.no_truncation()
        return self._tokenizer.encode(text, add_special_tokens=added)

    def _words(self, words: list[str]) -> Columns:
        """Encodes words; before each word stands a space where the tokenizer else takes it for the end of a word."""
        spaced = [self._spaced and word != "" and not self._stands_alone(word) for word in words]
        texts = [" " + word if own else word for word, own in zip(words, spaced, strict=True)]
        encoding = self._tokenizer.encode(texts, is_pretokenized=True)
        word_of, starts, ends = [], [], []
        for word, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True):
            shift = int(word is not None and spaced[word])
            word_of.append(None if shift and end <= 1 else word)  # a token of the space alone knows nothing of the word
            starts.append(max(start - shift, 0))
            ends.append(max(end - shift, 0))
        sequences = _numbers(encoding.sequence_ids)
        return encoding.ids, encoding.type_ids, sequences, _numbers(word_of), starts, ends

    def _stands_alone(self, word: str) -> bool:
        return word[0].isspace() or word.startswith(self._added)

    def _needs_space(self, word: str) -> bool:
        """Says whether a word inside a text has other ids than the word alone, and the same ids as after a space."""
        encode = self._tokenizer.encode
        inside = encode(f"{word} {word}", add_special_tokens=False).ids
        alone, after = (
            encode([word, second], is_pretokenized=True, add_special_tokens=False).ids for second in (word, " " + word)
        )
        return bool(inside == after != alone)

    def _around_texts(self) -> tuple[Any, Any]:
        """Returns the rules of special tokens around a text and around a target."""
        settings, old = self._settings, self._tokenizer.post_processor
        if settings["code_place"] in ("in front", "behind"):
            source, target = settings["source_language"], settings["target_language"]
            return self._coded(source) if source else old, self._coded(target) if target else old
        rule = old or self._template(["$A:0"], ["$A:0", "$B:1"], [])
        return rule, rule

    def _coded(self, code: str) -> Any:
        """Returns the rule for texts of one language: `code text eos`, or `text eos code`."""
        eos, behind = self._settings["tokens"]["eos_token"], self._settings["code_place"] == "behind"
        first, last = ([], [eos, code]) if behind else ([code], [eos])
        return self._template([*first, "$A", *last], [*first, "$A", "$B", *last], [eos, code])

    def _template(self, single: list[str], pair: list[str], tokens: list[str]) -> Any:
        from tokenizers import processors

        numbers = [(token, self._tokenizer.token_to_id(token)) for token in tokens]
        if missing := [token for token, number in numbers if number is None]:
            raise ValueError(f"token {missing[0]!r} is not in tokenizer.json")
        return processors.TemplateProcessing(single=single, pair=pair, special_tokens=numbers)

    def _unnamed(self, ids: Iterable[int]) -> list[str]:
        """Returns those of the tokens around a text that have no name in the settings, as a language code has none."""
        named = set(self._settings["tokens"].values())
        return [token for token in map(self._tokenizer.id_to_token, ids) if token not in named]


def around(processor: Any) -> tuple[list[int], list[int]]:
    """Returns the ids that a rule puts in front of a text and behind it."""
    return _ids_of(json.loads(processor.__getstate__())) if processor is not None else ([], [])


def _ids_of(rule: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    if rule["type"] == "Sequence":
        front, behind = list[int](), list[int]()
        for part in rule["processors"]:
            first, last = _ids_of(part)
            front, behind = [*first, *front], [*behind, *last]
        return front, behind
    if rule["type"] in ("BertProcessing", "RobertaProcessing"):
        return [rule["cls"][1]], [rule["sep"][1]]
    if rule["type"] != "TemplateProcessing":
        return [], []
    at = next(place for place, piece in enumerate(rule["single"]) if "Sequence" in piece)
    front, behind = (
        [number for piece in pieces for number in rule["special_tokens"][piece["SpecialToken"]["id"]]["ids"]]
        for pieces in (rule["single"][:at], rule["single"][at + 1 :])
    )
    return front, behind


def _numbers(column: Iterable[int | None]) -> Iterable[int]:
    return (NONE if number is None else number for number in column)


def _columns(encoding: Any) -> Columns:
    starts, ends = ([offsets[at] for offsets in encoding.offsets] for at in (0, 1))
    sequences, words = _numbers(encoding.sequence_ids), _numbers(encoding.word_ids)
    return encoding.ids, encoding.type_ids, sequences, words, starts, ends
