"""Reads the rows of a Parquet file."""

from pathlib import Path
from typing import Any

from offsite.errors import DataError
from offsite.task.readers.columns import Columns, check_columns
from offsite.task.readers.rows import UnreadableValue


def parquet_rows(path: Path, columns: Columns) -> list[dict[str, Any]]:
    """Returns the rows of a Parquet file as column name -> value, for the columns that are read.

    A value that the library cannot decode, for example text that is not UTF-8, is an `UnreadableValue`.

    Raises:
      DataError: the file is not a readable Parquet file, or lacks a column.
    """
    import pyarrow  # takes 0.4 s of CPU, and few sites have such a file
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(f"data={str(path)!r} is not a file; give one .parquet file")
    names = list(dict.fromkeys(column.name for column in columns.values()))
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            check_columns(path, columns, file.schema_arrow.names)
            table = file.read(columns=names)
    except (pyarrow.ArrowException, OSError):
        raise DataError(f"data={str(path)!r} is not a readable Parquet file; write it again") from None
    values = [_values(table.column(name)) for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


def _values(column: Any) -> list[Any]:
    """Returns the values of a column of a table; all at once where this works, because it is quicker."""
    try:
        values: list[Any] = column.to_pylist()
    except Exception:  # each kind of column fails in its own way
        return [_value(scalar) for scalar in column]
    return values


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except Exception:  # as above, and the way tells about the value
        return UnreadableValue()
