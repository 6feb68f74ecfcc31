"""Texts as rows of token ids and labels, from which the tasks make tensors; needs no model library.

A check before any work counts what can be learnt in these very rows, and so agrees with the training.
"""

from collections.abc import Sequence
from typing import Any

from offsite.errors import DataError, lookup
from offsite.task.conversations import messages_of
from offsite.task.labels import IGNORED, Labels
from offsite.task.records import fault
from offsite.task.spec import Record
from offsite.task.splits import PUBLIC_SPLITS, Frame, check_length
from offsite.task.tokenizer import Encoding, Tokenizer

Rows = list[list[int]]


def text_rows(
    tokenizer: Tokenizer, texts: Sequence[str], *, length: int, split: str, may_be_none: bool = False
) -> Rows:
    """Returns texts as rows of at most `length` tokens; arguments and errors as for `task.encode.encode`."""
    frame, cut = Frame.of(tokenizer), lookup(PUBLIC_SPLITS, split, "split")
    check_length(length - len(frame.start) - len(frame.end))
    rows = cut(tokenizer.tokens(texts, length if split == "truncate" else None), frame, length)
    if not rows and not may_be_none:
        raise DataError(f"examples=0 from {len(texts)} texts at length={length}; give more text or lower the length")
    return rows


def prompted_rows(tokenizer: Tokenizer, records: Sequence[Record], length: int) -> tuple[Rows, Rows]:
    """Returns prompts with their completions as rows, and 1 for each token of a completion, else 0."""
    prompts = tokenizer.tokens([record["prompt"] for record in records], length)
    completions = tokenizer.tokens([record["completion"] for record in records], length)
    frame = Frame.of(tokenizer)
    pairs = [
        (frame.begun(prompt), frame.ended(frame.bare(done)) if done else [])
        for prompt, done in zip(prompts, completions, strict=True)
    ]
    rows = [(prompt + done)[:length] for prompt, done in pairs]
    return rows, [([0] * len(prompt) + [1] * len(done))[:length] for prompt, done in pairs]


def chat_rows(tokenizer: Tokenizer, records: Sequence[Record], length: int) -> tuple[Rows, Rows]:
    """Returns conversations as rows, and 1 for each token of an answer, else 0."""
    talks = [messages_of(records, index, tokenizer.template) for index in range(len(records))]
    encoded = tokenizer.chats(talks, length)
    return [ids for ids, _ in encoded], [flags for _, flags in encoded]


def labelled_texts(
    tokenizer: Tokenizer, records: Sequence[Record], length: int, model_config: Any
) -> tuple[list[Encoding], list[int]]:
    """Returns texts, and the number of each text's label; `IGNORED` for a text without tokens."""
    labels = Labels(model_config).of(records, "label")
    texts = tokenizer.singles([record["text"] for record in records], length)
    return texts, [label if text.ids else IGNORED for label, text in zip(labels, texts, strict=True)]


def labelled_words(
    tokenizer: Tokenizer, records: Sequence[Record], length: int, model_config: Any
) -> tuple[list[Encoding], Rows]:
    """Returns lists of words as texts, and the label of each word at its first token, `IGNORED` at other tokens."""
    words = [_words(records, index) for index in range(len(records))]
    labels = Labels(model_config).lists_of(records, "labels")
    encodings = tokenizer.worded(words, length)
    return encodings, [_at_first_tokens(encoding, own) for encoding, own in zip(encodings, labels, strict=True)]


def translated_rows(tokenizer: Tokenizer, records: Sequence[Record], length: int) -> tuple[list[Encoding], Rows]:
    """Returns the sources of pairs of texts, and the tokens of each target; no token where the source has none."""
    sources = tokenizer.singles([record["source"] for record in records], length)
    targets = tokenizer.targets([record["target"] for record in records], length)
    return sources, [target.ids if source.ids else [] for target, source in zip(targets, sources, strict=True)]


def _words(records: Sequence[Record], index: int) -> list[str]:
    """Returns a record's words; an empty list for a faulty record in `LenientRecords`."""
    words, labels = records[index]["words"], records[index]["labels"]
    if not all(isinstance(word, str) for word in words):
        fault(records, index, "words", "must be a list of texts; correct the field")
        return []
    if len(words) != len(labels):
        fault(records, index, "labels", "must be as many as the words; correct the field")
        return []
    return list(words)


def _at_first_tokens(encoding: Encoding, labels: Sequence[int]) -> list[int]:
    """Returns the label of each token: the word's label at its first token, else `IGNORED`."""
    row, seen = [], set[int]()
    for word in encoding.words:
        first = 0 <= word < len(labels) and word not in seen
        row.append(labels[word] if first else IGNORED)
        seen.add(word)
    return row
