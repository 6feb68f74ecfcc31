"""From the columns of a data file to the fields of a task's records."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from offsite.errors import ConfigError, DataError, lookup, nearest
from offsite.task.spec import Record
from offsite.task.tasks import TASKS


@dataclass(frozen=True)
class Column:
    """Where a field of a record is read from: the column's name in the file, and the type that must stand there."""

    name: str
    kind: type


Columns = Mapping[str, Column]  # field of a record -> column
Reader = Callable[[Path, Columns], list[Record]]


def columns_of(fields: Mapping[str, type], *, column: str = "", names: Mapping[str, str]) -> Columns:
    """Returns the columns that a task's fields are read from, each its own name unless another is given.

    Args:
      fields: `columns` of a task.
      column: of its main field; empty for the field's name.
      names: field -> column, of any.

    Raises:
      ConfigError: the task has no such field, or its main one is named twice.
    """
    main, given = next(iter(fields)), dict(names)
    if unknown := [field for field in given if field not in fields]:
        hint = nearest(unknown[0], list(fields))
        raise ConfigError(f"columns.{unknown[0]}: the task reads {', '.join(fields)}; {hint}")
    if column and given.setdefault(main, column) != column:
        raise ConfigError(f"column={column!r} and columns.{main}={given[main]!r}: name the column once")
    return {field: Column(given.get(field, field), kind) for field, kind in fields.items()}


def columns_for(task: str, *, column: str, names: Mapping[str, str]) -> Columns:
    """Returns the columns that a job's task reads at a site whose own file may name columns for other tasks too.

    Args:
      task: a key of `task.tasks.TASKS`.
      column: of the task's main field; empty for the field's name.
      names: field -> column, of any task's.

    Raises:
      UnknownName: there is no such task.
      ConfigError: no task has such a field, or the main one is named twice.
    """
    fields = lookup(TASKS, task, "task").columns
    known = sorted({field for one in TASKS.values() for field in one.columns})
    if unknown := [field for field in names if field not in known]:
        raise ConfigError(f"columns.{unknown[0]}: no task reads such a field; {nearest(unknown[0], known)}")
    return columns_of(fields, column=column, names={field: names[field] for field in names if field in fields})


def check_columns(path: Path, columns: Columns, present: Sequence[str]) -> None:
    """Checks that a file has every column that is read.

    Raises:
      DataError: one is not there; the names shown are shortened: where a csv has no header, they are a first record.
    """
    for name in (one.name for one in columns.values() if one.name not in present):
        known = [column[:24] for column in present[:16]]
        hint = nearest(name, known)
        raise DataError(
            f"column={name!r} is not in data={str(path)!r}, columns={', '.join(known) or 'none'}; "
            + (hint if hint.startswith("did") else "name one of these columns")
        )


def parquet_rows(path: Path, columns: Columns) -> list[dict[str, Any]]:
    """Returns the rows of a Parquet file, of the columns that are read, by the file's names.

    Raises:
      DataError: it is no readable Parquet file, or lacks a column.
    """
    if not path.is_file():
        raise DataError(f"data={str(path)!r} is not a file; give one .parquet file")
    names = list(dict.fromkeys(one.name for one in columns.values()))
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            check_columns(path, columns, file.schema_arrow.names)
            rows: list[dict[str, Any]] = file.read(columns=names).to_pylist()
    except (pyarrow.ArrowException, OSError):
        raise DataError(f"data={str(path)!r} is not a readable Parquet file; write it again") from None
    return rows
