"""Reads a site's records from common file formats; no message here ever holds a record's content."""

import json
from functools import partial
from pathlib import Path

from offsite.errors import DataError, lookup
from offsite.task.readers.columns import Columns, Reader, check_columns
from offsite.task.readers.csv_rows import csv_rows, values_of
from offsite.task.readers.image_files import read_image_parquet, read_images, read_npz
from offsite.task.readers.parquet import parquet_rows
from offsite.task.readers.rows import Values, rows, strict, text_of
from offsite.task.records import LenientRecords, OnFault, is_empty
from offsite.task.spec import Record

COLUMN = "text"  # the only column of a folder of texts
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
SUFFIXES |= {".npz": "npz"}


def read(path: Path | str, *, reader: str | None, columns: Columns) -> list[Record]:
    """Returns the records of a data file or folder in file order, for somebody to whom the file belongs.

    A record whose main field is blank is an empty record, see `task.records.Row`.

    Args:
      path: a file; for reader "text" also a folder of .txt files, for reader "images" a folder of folders.
      reader: key of `READERS`, or None to choose the reader by the suffix.
      columns: columns from `columns_of`, the main column first.

    Raises:
      DataError: the path is missing or damaged, lacks a column, has a broken row, or holds no record but empty ones.
      UnknownName: there is no such reader.
    """
    records = _read(Path(path), reader, columns, strict)
    if all(is_empty(record) for record in records):
        raise DataError(f"data={str(path)!r} holds no {next(iter(columns))}; give a file with at least one record")
    return records


def read_for_job(path: Path | str, *, reader: str | None, columns: Columns) -> LenientRecords:
    """Returns the records of a site's data for a job, in file order; a broken row is an empty record.

    The coordinator learns whether a job could be opened, so the content of a row must not decide that. Only facts about
    the file as a whole raise: its path, its format, its columns.

    Args:
      path: file or folder, as for `read`.
      reader: key of `READERS`, or None to choose the reader by the suffix.
      columns: columns from `columns_of`, the main column first.

    Raises:
      DataError: the path is missing, the file is not of its format or lacks a column, or there is no row.
      UnknownName: there is no such reader.
    """
    faults: list[str] = []
    records = _read(Path(path), reader, columns, lambda error: faults.append(str(error)))
    if not records:
        raise DataError(f"data={str(path)!r} has no row; give a file with at least one record")
    return LenientRecords(records, faults)


def _read(source: Path, reader: str | None, columns: Columns, on_fault: OnFault) -> list[Record]:
    if not source.exists():
        raise DataError(f"data={str(source)!r} does not exist; give the path of a data file or folder")
    return lookup(READERS, reader if reader is not None else _by_suffix(source), "reader")(source, columns, on_fault)


def read_jsonl(path: Path, columns: Columns, on_fault: OnFault) -> list[Record]:
    """Returns one record for each line of a file of JSON objects, one object on each line; of a blank line too."""
    lines = _decoded(path).split("\n")
    lines = lines if lines[-1].strip() else lines[:-1]  # there is no line behind the end of the last line
    sources = [
        (f"line={number}", partial(_object, path, columns, f"line={number}", line))
        for number, line in enumerate(lines, start=1)
    ]
    return rows(path, columns, sources, on_fault)


def read_csv(path: Path, columns: Columns, on_fault: OnFault) -> list[Record]:
    """Returns one record for each row of a comma-separated file whose first row names the columns; of a blank row too.

    A field of type list holds JSON. A broken row costs its first line, and the next line starts a new row, so that an
    open quote in one record does not take the records behind it.
    """
    table = list(csv_rows(_decoded(path)))
    header = table[0][1] if table else []
    if isinstance(header, str):
        raise DataError(f"data={str(path)!r} line=1 {header}")
    check_columns(path, columns, header)
    sources = [
        (f"line={line}", partial(values_of, path, f"line={line}", columns, header, cells)) for line, cells in table[1:]
    ]
    return rows(path, columns, sources, on_fault)


def read_parquet(path: Path, columns: Columns, on_fault: OnFault) -> list[Record]:
    """Returns one record for each row of a Parquet file."""
    table = enumerate(parquet_rows(path, columns), start=1)
    return rows(path, columns, [(f"row={number}", partial(dict, values)) for number, values in table], on_fault)


def read_text(path: Path, columns: Columns, on_fault: OnFault) -> list[Record]:
    """Returns the text of a .txt file as a record, or one record for each .txt file of a folder, in order of names."""
    check_columns(path, columns, [COLUMN])
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"data={str(path)!r} has no .txt file; write each text to a .txt file")
    texts = [_decoded(file) for file in files]  # a file that cannot be read now is no broken record
    sources = [
        (f"text={number}", partial(_whole, path, f"text={number}", text)) for number, text in enumerate(texts, start=1)
    ]
    return rows(path, columns, sources, on_fault)


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
    """Returns a file's text without the byte order mark that some programs write; `text_of` checks its UTF-8."""
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    except OSError as error:
        raise DataError(f"data={str(path)!r} cannot be read ({error.strerror}); give a readable file") from None


def _whole(path: Path, where: str, text: str) -> Values:
    return {COLUMN: text_of(text, path, where)}


def _object(path: Path, columns: Columns, where: str, line: str) -> Values:
    """Returns the JSON object of a line; of a blank line an object of blank fields."""
    if not line.strip():
        return {column.name: "" if column.kind is object else column.kind() for column in columns.values()}
    try:
        values = json.loads(text_of(line, path, where))
    except (ValueError, RecursionError):  # `from None`: the cause would hold the line
        raise DataError(f"data={str(path)!r} {where} is not JSON; write one object a line") from None
    if not isinstance(values, dict):
        raise DataError(f"data={str(path)!r} {where} is not a JSON object; write one object a line")
    check_columns(path, columns, list(values))
    return values
