"""How many records have something to learn from, and why the first of the others has not.

The reasons are for somebody to whom the records belong: the owner of a file, or a simulation. They follow from the
records, so that no reason may leave a site.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from offsite.errors import ConfigError, OffsiteError
from offsite.task.records import LenientRecords, is_empty, place_of, without_empty
from offsite.task.spec import Batch, Record, Task
from offsite.task.target_counts import TargetCounter

PUBLIC, TRAINING, HELD_OUT = "public", "training", "held out"  # parts that a file of records has in a job
LONGER = (4, 64)  # times the length, in the search for a length that holds something to learn


@dataclass(frozen=True)
class Encoder:
    """Everything that turns the records of a job into examples.

    Attributes:
      task: task of the job.
      processor: tokenizer or image processor of the model.
      length: number of tokens of an example.
      split: name in `task.splits.SPLITS`.
      model_config: configuration of the model.
    """

    task: Task
    processor: Any
    length: int
    split: str
    model_config: Any

    def encode(self, records: Sequence[Record], length: int | None = None) -> Batch:
        """Returns records as examples; an empty record is an example without a target.

        Args:
          records: records of one data file.
          length: number of tokens in place of the job's.
        """
        examples = self.task.encode(
            self.processor,
            records,
            length=self.length if length is None else length,
            split=self.split,
            model_config=self.model_config,
        )
        return without_empty(examples, records, self.split)

    def targets(self, records: Sequence[Record], length: int | None = None) -> list[int]:
        """Returns the number of targets of each example; arguments as for `encode`."""
        return counted(self.encode(records, length))


# What counts the targets of records: by encoding them, or without tensors.
Counter: TypeAlias = Encoder | TargetCounter


def counted(examples: Batch) -> list[int]:
    """Returns the number of targets of each example."""
    return [int(count) for count in examples.targets.tolist()]


@dataclass(frozen=True)
class Learnt:
    """What can be learnt from the records of one file.

    Attributes:
      records: number of records.
      left_out: number of records that have no target.
      targets: number of targets of all examples.
      first: place of the first record that is left out, and the reason; empty where no record is left out.
    """

    records: int
    left_out: int
    targets: int
    first: str = ""

    @property
    def nothing(self) -> bool:
        """Whether no record has a target."""
        return self.left_out == self.records

    def __str__(self) -> str:
        """The sentence on the records that are left out."""
        return f"{self.left_out} of {self.records} records came to nothing; the first because {self.first}"


def learnt(counter: Counter, records: Sequence[Record], targets: Sequence[int]) -> Learnt:
    """Returns what can be learnt from records.

    Args:
      counter: counter of the job.
      records: records of one file.
      targets: number of targets of each example of the records.
    """
    if counter.split == "truncate":  # each record is one example
        without = [place for place, count in enumerate(targets) if not count]
    else:
        without = [] if any(targets) else list(range(len(records)))
    first = reason(counter, records, without[0]) if without else ""
    return Learnt(len(records), len(without), sum(targets), first)


def reason(counter: Counter, records: Sequence[Record], index: int) -> str:
    """Returns the place of a record without a target, and why it has none; the record is encoded at larger lengths."""
    place = place_of(records, index)
    for fault in records.faults if isinstance(records, LenientRecords) else ():
        if f"{place} " in fault or f"{place}," in fault:
            return fault
    return f"{place}: {_reason(counter, records[index])}"


def _reason(counter: Counter, record: Record) -> str:
    if is_empty(record):
        return "it is blank"
    try:
        needed = _length_needed(counter, record)
    except OffsiteError as error:
        return str(error)
    if needed is not None:
        return (
            f"its first {counter.length} tokens hold nothing to learn; with data.length = {needed} something is left, "
            "so raise data.length or shorten the record"
        )
    return _made_of(counter, record)


def _length_needed(counter: Counter, record: Record) -> int | None:
    """Returns a length at which a record has a target, or None where none of `LONGER` helps.

    Raises:
      OffsiteError: the record breaks a rule of the task.
    """
    for length in (times * counter.length for times in LONGER):
        try:
            if any(counter.targets([record], length)):
                return length
        except ConfigError:
            return None  # the model has no more positions
    return None


def _made_of(counter: Counter, record: Record) -> str:
    """Returns the field of which the tokenizer makes too few tokens, where that is the reason."""
    tokens = getattr(counter.processor, "tokens", None)
    texts = {field: value for field, value in record.items() if isinstance(value, str)}
    if tokens is not None and texts:
        counts = dict(zip(texts, map(len, tokens(list(texts.values()), counter.length)), strict=True))
        field, count = min(counts.items(), key=lambda pair: pair[1])
        if count == 0:
            return f"field={field!r}: the model's tokenizer makes no token of it, or fails on it"
        if count == 1 and len(texts) == 1:
            return f"field={field!r}: it makes 1 token, and 2 are the fewest, since each token is learnt from another"
    if getattr(counter.processor, "has_template", False) and "messages" in record:
        return "the model's chat template fails on it, or makes no token of an answer; see the roles and their order"
    return "the model's tokenizer or processor makes nothing of it that can be learnt"
