"""Reads the rows of a Parquet file."""

from pathlib import Path
from typing import Any

from offsite.errors import DataError
from offsite.task.readers.columns import Columns, check_columns


def parquet_rows(path: Path, columns: Columns) -> list[dict[str, Any]]:
    """Returns the rows of a Parquet file as column name -> value, for the columns that are read.

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
            rows: list[dict[str, Any]] = file.read(columns=names).to_pylist()
    except (pyarrow.ArrowException, OSError):
        raise DataError(f"data={str(path)!r} is not a readable Parquet file; write it again") from None
    return rows
