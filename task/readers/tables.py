"""A site's records, from the file formats people have. No message here ever holds a record's content."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offsite.errors import DataError, lookup
from offsite.task.readers.columns import Columns, Reader, check_columns, parquet_rows
from offsite.task.readers.image_files import read_image_parquet, read_images, read_npz
from offsite.task.records import Row
from offsite.task.spec import Record

COLUMN = "text"  # what a folder of texts has
LONGEST_FIELD = 2**31 - 1  # characters of a csv field; the standard library stops at 2**17 unless told
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
SUFFIXES |= {".npz": "npz"}


def read(path: Path | str, *, reader: str | None, columns: Columns) -> list[Record]:
    """Returns the records of a data file or folder, in file order; those whose main field is blank are left out.

    Args:
      path: a file, or for "text" also a folder of .txt files.
      reader: a key of `READERS`, or None to go by the suffix.
      columns: of `columns_of`; the main one first.

    Raises:
      DataError: the path is missing, damaged, has no such column, or holds no record.
      UnknownName: no such reader.
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
    """Returns one record per line, each line one JSON object."""
    records: list[Record] = []
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):  # `from None`: the cause would carry the line
            raise DataError(f"data={str(path)!r} line={number} is not JSON; write one object a line") from None
        if not isinstance(values, dict):
            raise DataError(f"data={str(path)!r} line={number} is not a JSON object; write one object a line")
        check_columns(path, columns, list(values))
        records.append(_row(path, f"line={number}", columns, values))
    return records


def read_csv(path: Path, columns: Columns) -> list[Record]:
    """Returns one record per row of a comma-separated file whose first row names the columns.

    A list stands as JSON in its field.
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
                        f"data={str(path)!r} line={rows.line_num} has {len(row)} fields, the header {len(header)}; "
                        "quote texts that hold commas"
                    )
                if row:
                    where = f"line={rows.line_num}"
                    values = {one.name: row[header.index(one.name)] for one in columns.values()}
                    records.append(_row(path, where, columns, _typed(path, where, columns, values)))
        except csv.Error:
            raise DataError(f"data={str(path)!r} line={rows.line_num} is not CSV; check its quotes") from None
    return records


def read_parquet(path: Path, columns: Columns) -> list[Record]:
    """Returns one record per row of a Parquet file."""
    return [
        _row(path, f"row={number}", columns, values)
        for number, values in enumerate(parquet_rows(path, columns), start=1)
    ]


def read_text(path: Path, columns: Columns) -> list[Record]:
    """Returns the text of a .txt file, or one text per .txt file of a folder, by name."""
    check_columns(path, columns, [COLUMN])
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"data={str(path)!r} has no .txt file; put one text in each")
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
            f"data={str(path)!r} has a suffix no reader is known for; name a reader: {', '.join(sorted(READERS))}"
        )
    return SUFFIXES[path.suffix.lower()]


def _decoded(path: Path) -> str:
    """Returns a file's UTF-8 text, without the byte order mark some programs write."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"data={str(path)!r} is not UTF-8 at byte {error.start}; convert it to UTF-8") from None
    except OSError as error:
        raise DataError(f"data={str(path)!r} cannot be read ({error.strerror}); give a readable file") from None


_WORDS = {str: "text", int: "a whole number", list: "a list", object: "a name or a whole number"}


def _row(path: Path, where: str, columns: Columns, values: Mapping[str, Any]) -> Row:
    """Returns a record of what a file has, checked; `values` are by the file's names."""
    for one in columns.values():
        value = values[one.name]
        fits = isinstance(value, str | int) if one.kind is object else isinstance(value, one.kind)
        if not fits or (one.kind is int and isinstance(value, bool)):
            raise DataError(
                f"data={str(path)!r} {where} column={one.name!r} holds {type(value).__name__}, not {_WORDS[one.kind]}; "
                "correct it, or name another column"
            )
    return Row({field: values[one.name] for field, one in columns.items()}, where)


def _typed(path: Path, where: str, columns: Columns, values: dict[str, str]) -> dict[str, Any]:
    """Returns a row of texts with numbers and lists in the place of those that stand for one."""
    typed: dict[str, Any] = dict(values)
    for one in columns.values():
        if one.kind in (int, list):
            try:
                typed[one.name] = json.loads(values[one.name])
            except (ValueError, RecursionError):  # `from None`: the cause would carry the field
                raise DataError(
                    f"data={str(path)!r} {where} column={one.name!r} holds text, not {_WORDS[one.kind]}; correct it, "
                    "or name another column"
                ) from None
    return typed


def _is_blank(value: object) -> bool:
    return not value.strip() if isinstance(value, str) else isinstance(value, list) and not value


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lifts the csv module's limit on a field's length, and puts it back."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
