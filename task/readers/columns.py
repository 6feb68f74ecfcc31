"""Maps the columns of a data file to the fields of a task's records."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offsite.errors import ConfigError, DataError, lookup, nearest
from offsite.task.record_fields import FIELDS, LABELS
from offsite.task.records import OnFault
from offsite.task.spec import Record


@dataclass(frozen=True)
class Column:
    """The column that a field of a record is read from.

    Attributes:
      name: name of the column in the file.
      kind: type of the column's values; `object` stands for a name, a number or an array.
      labels: value in the file -> name of the model's label; empty where the values are labels themselves.
    """

    name: str
    kind: type
    labels: Mapping[str, str] = field(default_factory=dict)


Columns = Mapping[str, Column]  # field of a record -> column
Reader = Callable[[Path, Columns, OnFault], Iterable[Record]]


def columns_of(
    fields: Mapping[str, type], *, column: str = "", names: Mapping[str, str], labels: Mapping[str, str] | None = None
) -> Columns:
    """Returns the columns that a task's fields are read from; a column has its field's name unless `names` has another.

    Args:
      fields: `columns` of a task.
      column: name of the main field's column; empty for the field's own name.
      names: field -> name of its column, for any fields.
      labels: value in the file -> name of the model's label, for the fields that hold labels.

    Raises:
      ConfigError: the task has no such field, or the column of the main field is named twice.
    """
    main, renamed = next(iter(fields)), dict(names)
    if unknown := [field for field in renamed if field not in fields]:
        hint = nearest(unknown[0], list(fields))
        raise ConfigError(f"columns.{unknown[0]}: the task reads {', '.join(fields)}; {hint}")
    if column and renamed.setdefault(main, column) != column:
        raise ConfigError(f"column={column!r} and columns.{main}={renamed[main]!r} must be the same; name it once")
    return {
        name: Column(renamed.get(name, name), kind, dict(labels or {}) if name in LABELS else {})
        for name, kind in fields.items()
    }


def columns_for(
    task: str, *, column: str, names: Mapping[str, str], labels: Mapping[str, str] | None = None
) -> Columns:
    """Returns the columns that a job's task reads at a site whose own file may also name columns for other tasks.

    Args:
      task: key of `task.record_fields.FIELDS`.
      column: name of the column of the task's main field; empty for the field's own name.
      names: field -> name of its column, for fields of any task.
      labels: value in the file -> name of the model's label, for the fields that hold labels.

    Raises:
      UnknownName: there is no such task.
      ConfigError: no task has such a field, or the column of the main field is named twice.
    """
    fields = lookup(FIELDS, task, "task")
    known = sorted({field for other in FIELDS.values() for field in other})
    if unknown := [field for field in names if field not in known]:
        raise ConfigError(f"columns.{unknown[0]}: no task reads such a field; {nearest(unknown[0], known)}")
    own = {field: names[field] for field in names if field in fields}
    return columns_of(fields, column=column, names=own, labels=labels)


def check_columns(path: Path, columns: Columns, present: Sequence[str], where: str = "") -> None:
    """Checks that a file, or a row, has every column that is read, and has each of them once.

    Args:
      path: the file, for messages.
      columns: the columns that are read.
      present: names of the columns that the file or the row has.
      where: place of the row, for messages; empty for the file as a whole.

    Raises:
      DataError: a column is missing, or stands there twice. The message shortens the present names, because in a csv
        without a header they are a first record.
    """
    data = f"data={str(path)!r} {where}".rstrip()
    for key, name in ((key, column.name) for key, column in columns.items()):
        if present.count(name) > 1:
            raise DataError(
                f"column={name!r} stands {present.count(name)} times in {data}; rename or remove all but one"
            )
        if name in present:
            continue
        known = [other[:24] for other in present[:16]]
        hint = nearest(name, known)
        raise DataError(
            f"column={name!r} is not in {data}, columns={', '.join(known) or 'none'}; "
            + (hint if hint.startswith("did") else f'write columns = {{ {key} = "NAME" }} with one of these names')
        )
