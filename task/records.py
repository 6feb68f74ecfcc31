"""Records from readers, and the faults that a task finds: a fault names the place of a record, never its content."""

from collections.abc import Mapping, Sequence
from typing import Any

from offsite.errors import ConfigError, DataError
from offsite.task.spec import Record


class Row(dict[str, Any]):
    """A record with its place in a data file.

    Attributes:
      place: place of the record for messages, for example `line=12`.
    """

    def __init__(self, fields: Mapping[str, Any], place: str) -> None:
        super().__init__(fields)
        self.place = place


class LenientRecords(list[Record]):
    """Records at a site whose owner approved a job; a record that breaks a rule of the task loses its target.

    A refusal would tell something about the records, and the coordinator chooses some of the rules, for example the
    names of the labels. So the job goes on, and only the site's owner sees the faults.

    Attributes:
      faults: messages about faulty records, for the owner.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        super().__init__(records)
        self.faults: list[str] = []


def fault(records: Sequence[Record], index: int, field: str, rule: str) -> None:
    """Records a fault of a record in `LenientRecords`, or raises it; arguments as for `refuse`.

    Raises:
      DataError: the records are not `LenientRecords`.
    """
    error = refuse(records, index, field, rule)
    if not isinstance(records, LenientRecords):
        raise error
    records.faults.append(str(error))


def refuse(records: Sequence[Record], index: int, field: str, rule: str) -> DataError:
    """Returns the error for a record that breaks a rule.

    Args:
      records: records of a data file.
      index: index of the record.
      field: name of the faulty field.
      rule: the broken rule, and the next step.
    """
    place = getattr(records[index], "place", f"record={index + 1}")
    return DataError(f"{place} field={field!r}: {rule}")


def check_split(split: str, task: str) -> None:
    """Refuses a split that would join records, for a task whose records are its examples.

    Raises:
      ConfigError: the split is not "truncate".
    """
    if split != "truncate":
        raise ConfigError(f"split={split!r}: the records of task={task!r} are its examples; write split = 'truncate'")
