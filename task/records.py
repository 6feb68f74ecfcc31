"""Records from readers, and the faults that a task finds: a fault names the place of a record, never its content.

A record counts whatever its content is: the number of records is public, and must not follow from a blank or a broken
one. So a record without content, and at an approved job also a record that cannot be read, stays as an empty record,
from which nothing is learnt.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from offsite.errors import ConfigError, DataError
from offsite.task.spec import Batch, Record

B = TypeVar("B", bound=Batch)
OnFault = Callable[[DataError], None]  # called with the fault of one record; raises it, or notes it for the owner


class Row(dict[str, Any]):
    """A record with its place in a data file.

    Attributes:
      place: place of the record for messages, for example `line=12`.
      empty: whether the record has no content; its fields then hold the empty value of their type.
      source: path of the data file; empty where the record comes from no file.
    """

    __slots__ = ("empty", "place", "source")  # a file may have millions of rows

    def __init__(self, fields: Mapping[str, Any], place: str, *, empty: bool = False, source: str = "") -> None:
        super().__init__(fields)
        self.place, self.empty, self.source = place, empty, source


class LenientRecords(list[Record]):
    """Records at a site whose owner approved a job; a record that breaks a rule of the task loses its target.

    A refusal would tell something about the records, and the coordinator chooses some of the rules, for example the
    names of the labels. So the job goes on, and only the site's owner sees the faults.

    Attributes:
      faults: messages about faulty records, for the owner.
      rows: index of the record of each fault that a task found, in the order in which the task found them.
    """

    def __init__(self, records: Sequence[Record], faults: Sequence[str] = ()) -> None:
        super().__init__(records)
        self.faults, self.rows = list(faults), list[int]()


def fault(records: Sequence[Record], index: int, field: str, rule: str) -> None:
    """Records a fault of a record in `LenientRecords`, or raises it; arguments as for `refuse`.

    An empty record breaks no rule.

    Raises:
      DataError: the records are not `LenientRecords`.
    """
    if is_empty(records[index]):
        return
    error = refuse(records, index, field, rule)
    if not isinstance(records, LenientRecords):
        raise error
    records.faults.append(str(error))
    records.rows.append(index)


def refuse(records: Sequence[Record], index: int, field: str, rule: str) -> DataError:
    """Returns the error for a record that breaks a rule.

    Args:
      records: records of a data file.
      index: index of the record.
      field: name of the faulty field.
      rule: the broken rule, and the next step.
    """
    return DataError(f"{place_of(records, index)} field={field!r}: {rule}")


def place_of(records: Sequence[Record], index: int) -> str:
    """Returns the place of a record for messages: its file, where it has one, and its place there."""
    record = records[index]
    place, source = getattr(record, "place", f"record={index + 1}"), getattr(record, "source", "")
    return f"data={source!r} {place}" if source else str(place)


def is_empty(record: Record) -> bool:
    """Says whether a record has no content, so that nothing may be learnt from it."""
    return bool(getattr(record, "empty", False))


def without_empty(examples: B, records: Sequence[Record], split: str) -> B:
    """Returns the examples of a task; the example of an empty record has no target, whatever the task made of it.

    Args:
      examples: encoded records.
      records: records behind the examples.
      split: split of the encoding; only "truncate" makes one example of each record, and of an empty text no other
        split makes a target.
    """
    empty = [index for index, record in enumerate(records) if is_empty(record)]
    return examples.emptied(empty) if empty and split == "truncate" else examples


def check_split(split: str, task: str) -> None:
    """Refuses a split that would join records, for a task whose records are its examples.

    Raises:
      ConfigError: the split is not "truncate".
    """
    if split != "truncate":
        raise ConfigError(f"split={split!r}: the records of task={task!r} are its examples; write split = 'truncate'")
