"""Reads a site's records from common file formats; no message here ever holds a record's content."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offsite.errors import DataError, lookup
from offsite.task.readers.columns import Columns, Reader, check_columns
from offsite.task.readers.image_files import read_image_parquet, read_images, read_npz
from offsite.task.readers.parquet import parquet_rows
from offsite.task.records import Row
from offsite.task.spec import Record

COLUMN = "text"  # the only column of a folder of texts
LONGEST_FIELD = 2**31 - 1  # characters of a csv field; the standard library's default limit is 2**17
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
SUFFIXES |= {".npz": "npz"}


def read(path: Path | str, *, reader: str | None, columns: Columns) -> list[Record]:
    """Returns the records of a data file or folder in file order, without records whose main field is blank.

    Args:
      path: a file; for reader "text" also a folder of .txt files, for reader "images" a folder of folders.
      reader: key of `READERS`, or None to choose the reader by the suffix.
      columns: columns from `columns_of`, the main column first.

    Raises:
      DataError: the path is missing or damaged, lacks a column, or holds no record.
      UnknownName: there is no such reader.
    """
    source, main = Path(path), next(iter(columns))
    if not source.exists():
        raise DataError(f"data={str(source)!r} does not exist; give the path of a data file or folder")
    records = lookup(READERS, reader if reader is not None else _by_suffix(source), "reader")(source, columns)
    kept = [record for record in records if not _is_blank(record[main])]
    if not kept:
        raise DataError(f"data={str(source)!r} holds no {main}; give a file with at least one record")
    return kept


def read_jsonl(path: Path, columns: Columns) -> list[Record]:
    """Returns one record for each line of a file of JSON objects, one object on each line."""
    records: list[Record] = []
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):  # `from None`: the cause would hold the line
            raise DataError(f"data={str(path)!r} line={number} is not JSON; write one object a line") from None
        if not isinstance(values, dict):
            raise DataError(f"data={str(path)!r} line={number} is not a JSON object; write one object a line")
        check_columns(path, columns, list(values))
        records.append(_row(path, f"line={number}", columns, values))
    return records


def read_csv(path: Path, columns: Columns) -> list[Record]:
    """Returns one record for each row of a comma-separated file whose first row names the columns.

    A field of type list holds JSON.
    """
    records: list[Record] = []
    with _long_fields():
        rows = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
        try:
            header = next(rows, [])
            check_columns(path, columns, header)
            for row in rows:
                if row and len(row) != len(header):
                    raise DataError(
                        f"data={str(path)!r} line={rows.line_num} has {len(row)} fields, must have {len(header)}, "
                        "as the header; quote texts that hold commas"
                    )
                if row:
                    where = f"line={rows.line_num}"
                    values = {column.name: row[header.index(column.name)] for column in columns.values()}
                    records.append(_row(path, where, columns, _typed(path, where, columns, values)))
        except csv.Error:
            raise DataError(f"data={str(path)!r} line={rows.line_num} is not CSV; check its quotes") from None
    return records


def read_parquet(path: Path, columns: Columns) -> list[Record]:
    """Returns one record for each row of a Parquet file."""
    return [
        _row(path, f"row={number}", columns, values)
        for number, values in enumerate(parquet_rows(path, columns), start=1)
    ]


def read_text(path: Path, columns: Columns) -> list[Record]:
    """Returns the text of a .txt file as a record, or one record for each .txt file of a folder, in order of names."""
    check_columns(path, columns, [COLUMN])
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"data={str(path)!r} has no .txt file; write each text to a .txt file")
    return [_row(path, f"text={number}", columns, {COLUMN: _decoded(file)}) for number, file in enumerate(files, 1)]


READERS: dict[str, Reader] = {
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
    "text": read_text,
    "images": read_images,
    "image_parquet": read_image_parquet,
    "npz": read_npz,
}


def _by_suffix(path: Path) -> str:
    if path.is_dir():
        return "text"
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"data={str(path)!r} has a suffix without a reader; name a reader: {', '.join(sorted(READERS))}"
        )
    return SUFFIXES[path.suffix.lower()]


def _decoded(path: Path) -> str:
    """Returns a file's UTF-8 text, without the byte order mark that some programs write."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"data={str(path)!r} is not UTF-8 at byte {error.start}; convert it to UTF-8") from None
    except OSError as error:
        raise DataError(f"data={str(path)!r} cannot be read ({error.strerror}); give a readable file") from None


_WORDS = {str: "text", int: "a whole number", list: "a list", object: "a name or a whole number"}


def _row(path: Path, where: str, columns: Columns, values: Mapping[str, Any]) -> Row:
    """Returns a record from the values of a row, by column name, after a check of their types."""
    for column in columns.values():
        value = values[column.name]
        fits = isinstance(value, str | int) if column.kind is object else isinstance(value, column.kind)
        if not fits or (column.kind is int and isinstance(value, bool)):
            raise DataError(
                f"data={str(path)!r} {where} column={column.name!r} holds {type(value).__name__}, not "
                f"{_WORDS[column.kind]}; correct it, or name another column"
            )
    return Row({field: values[column.name] for field, column in columns.items()}, where)


def _typed(path: Path, where: str, columns: Columns, values: dict[str, str]) -> dict[str, Any]:
    """Returns a row of texts, of which columns of numbers and lists are decoded from JSON."""
    typed: dict[str, Any] = dict(values)
    for column in columns.values():
        if column.kind in (int, list):
            try:
                typed[column.name] = json.loads(values[column.name])
            except (ValueError, RecursionError):  # `from None`: the cause would hold the field
                raise DataError(
                    f"data={str(path)!r} {where} column={column.name!r} holds text, not {_WORDS[column.kind]}; correct "
                    "it, or name another column"
                ) from None
    return typed


def _is_blank(value: object) -> bool:
    return not value.strip() if isinstance(value, str) else isinstance(value, list) and not value


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lifts the csv module's limit on the length of a field, and restores the limit at the end."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
