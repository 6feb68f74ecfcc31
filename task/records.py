"""Records as readers give them, and what a task says of one that is wrong: where it stands, never what it holds."""

from collections.abc import Mapping, Sequence
from typing import Any

from offsite.errors import ConfigError, DataError
from offsite.task.spec import Record


class Row(dict[str, Any]):
    """A record that knows where it stands.

    Attributes:
      place: for a message, as `line=12`.
    """

    def __init__(self, fields: Mapping[str, Any], place: str) -> None:
        super().__init__(fields)
        self.place = place


class LenientRecords(list[Record]):
    """Records at a site whose owner approved a job: one that breaks a rule of its task becomes one without a target.

    What a job's rules make of the records is an answer about them, and the coordinator chooses some of the rules, as
    the names of the labels; so the job goes on all the same, and only the site's owner is told.

    Attributes:
      faults: what was wrong, for the owner.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        super().__init__(records)
        self.faults: list[str] = []


def fault(records: Sequence[Record], index: int, field: str, rule: str) -> None:
    """Notes that a record breaks a rule of its task; arguments as for `refuse`.

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
      records: of a data file.
      index: of the record among them.
      field: that is wrong.
      rule: what has to hold, and the next step.
    """
    place = getattr(records[index], "place", f"record={index + 1}")
    return DataError(f"{place} field={field!r}: {rule}")


def check_split(split: str, task: str) -> None:
    """Refuses a split that would join records where each record is an example.

    Raises:
      ConfigError: it is another than "truncate".
    """
    if split != "truncate":
        raise ConfigError(f"split={split!r}: the records of task={task!r} are its examples; write split = 'truncate'")
