"""How many targets the records of a text task have, counted in their rows of tokens; needs no model library."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from offsite.task.labels import IGNORED
from offsite.task.records import LenientRecords, check_split, is_empty
from offsite.task.spec import Record
from offsite.task.token_rows import (
    Rows,
    chat_rows,
    labelled_texts,
    labelled_words,
    prompted_rows,
    text_rows,
    translated_rows,
)
from offsite.task.tokenizer import Tokenizer


@dataclass(frozen=True)
class TargetCounter:
    """Counts the targets of a text task's records, as `task.nothing_to_learn.Encoder` does by encoding them.

    Attributes:
      task: key of `COUNTS`.
      processor: tokenizer of the model.
      length: number of tokens of an example.
      split: name in `task.splits.SPLITS`.
      model_config: the model's labels, as its configuration states them; None for a task without labels.
    """

    task: str
    processor: Tokenizer
    length: int
    split: str
    model_config: Any = None

    def targets(self, records: Sequence[Record], length: int | None = None) -> list[int]:
        """Returns the number of targets of each example; 0 for the example of an empty record.

        Args:
          records: records of one data file.
          length: number of tokens in place of the job's.
        """
        counts = COUNTS[self.task](self, records, self.length if length is None else length)
        if self.split != "truncate":
            return counts
        return [0 if is_empty(record) else count for record, count in zip(records, counts, strict=True)]


def _texts(counter: TargetCounter, records: Sequence[Record], length: int) -> list[int]:
    texts, lenient = [record["text"] for record in records], isinstance(records, LenientRecords)
    rows = text_rows(counter.processor, texts, length=length, split=counter.split, may_be_none=lenient)
    return [max(len(row) - 1, 0) for row in rows]


def _answers(counter: TargetCounter, records: Sequence[Record], length: int) -> list[int]:
    """Counts the tokens of answers; the first token of a row has no token before it, and is no target."""
    check_split(counter.split, counter.task)
    make: Callable[[Tokenizer, Sequence[Record], int], tuple[Rows, Rows]]
    make = chat_rows if counter.task == "chat" else prompted_rows
    return [sum(row[1:]) for row in make(counter.processor, records, length)[1]]


def _labelled(counter: TargetCounter, records: Sequence[Record], length: int) -> list[int]:
    check_split(counter.split, counter.task)
    labels = labelled_texts(counter.processor, records, length, counter.model_config)[1]
    return [int(label != IGNORED) for label in labels]


def _words(counter: TargetCounter, records: Sequence[Record], length: int) -> list[int]:
    check_split(counter.split, counter.task)
    rows = labelled_words(counter.processor, records, length, counter.model_config)[1]
    return [sum(label != IGNORED for label in row) for row in rows]


def _translated(counter: TargetCounter, records: Sequence[Record], length: int) -> list[int]:
    check_split(counter.split, counter.task)
    return [len(row) for row in translated_rows(counter.processor, records, length)[1]]


COUNTS: dict[str, Callable[[TargetCounter, Sequence[Record], int], list[int]]] = {
    "causal_lm": _texts,
    "prompt_completion": _answers,
    "chat": _answers,
    "sequence_classification": _labelled,
    "token_classification": _words,
    "seq2seq": _translated,
}
