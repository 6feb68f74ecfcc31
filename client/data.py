"""A site's records, from the file formats people have. No message here ever holds a record's content."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet

from errors import DataError, lookup, nearest

COLUMN = "text"  # what jsonl, csv and parquet read where no column is named
LONGEST_FIELD = 2**31 - 1  # characters of a csv field; the standard library stops at 2**17 unless told
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def read(path: Path | str, *, reader: str | None, column: str | None) -> list[str]:
    """Returns the texts of a data file or folder, in file order; blank texts are left out.

    Args:
      path: a file, or for "text" also a folder of .txt files.
      reader: a key of `READERS`, or None to go by the suffix.
      column: the column that holds the text, or None for "text".

    Raises:
      DataError: the path is missing, damaged, has no such column, or holds no text.
      UnknownName: no such reader.
    """
    source = Path(path)
    if not source.exists():
        raise DataError(f"data={str(source)!r} does not exist; give the path of a data file or folder")
    texts = lookup(READERS, reader if reader is not None else _by_suffix(source), "reader")(source, column)
    kept = [text for text in texts if text.strip()]
    if not kept:
        raise DataError(f"data={str(source)!r} holds no text; give a file with at least one record")
    return kept


def read_jsonl(path: Path, column: str | None) -> list[str]:
    """Returns one text per line, each line one JSON object."""
    name = column or COLUMN
    texts: list[str] = []
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:  # `from None`: the cause would carry the line
            raise DataError(f"data={str(path)!r} line={number} is not JSON; write one object a line") from None
        if not isinstance(values, dict):
            raise DataError(f"data={str(path)!r} line={number} is not a JSON object; write one object a line")
        _check_column(path, name, list(values))
        texts.append(_text(path, f"line={number}", name, values[name]))
    return texts


def read_csv(path: Path, column: str | None) -> list[str]:
    """Returns one text per row of a comma-separated file whose first row names the columns."""
    name = column or COLUMN
    texts: list[str] = []
    with _long_fields():
        rows = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
        try:
            header = next(rows, [])
            _check_column(path, name, header)
            for row in rows:
                if row and len(row) != len(header):
                    raise DataError(
                        f"data={str(path)!r} line={rows.line_num} has {len(row)} fields, the header {len(header)}; "
                        "quote texts that hold commas"
                    )
                texts.extend(row[header.index(name)] for _ in row[:1])
        except csv.Error:
            raise DataError(f"data={str(path)!r} line={rows.line_num} is not CSV; check its quotes") from None
    return texts


def read_parquet(path: Path, column: str | None) -> list[str]:
    """Returns one text per row of a Parquet file."""
    name = column or COLUMN
    if not path.is_file():
        raise DataError(f"data={str(path)!r} is not a file; give one .parquet file")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_column(path, name, file.schema_arrow.names)
            values = file.read(columns=[name]).column(name).to_pylist()
    except (pyarrow.ArrowException, OSError):
        raise DataError(f"data={str(path)!r} is not a readable Parquet file; write it again") from None
    return [_text(path, f"row={number}", name, value) for number, value in enumerate(values, start=1)]


def read_text(path: Path, column: str | None) -> list[str]:
    """Returns the text of a .txt file, or one text per .txt file of a folder, by name."""
    _check_column(path, column or COLUMN, [COLUMN])
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"data={str(path)!r} has no .txt file; put one text in each")
    return [_decoded(file) for file in files]


READERS: dict[str, Callable[[Path, str | None], list[str]]] = {
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
    "text": read_text,
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


def _check_column(path: Path, name: str, columns: Sequence[str]) -> None:
    if name not in columns:
        # Shortened: where a csv has no header, these are a first record.
        known = [column[:24] for column in columns[:16]]
        hint = nearest(name, known)
        raise DataError(
            f"column={name!r} is not in data={str(path)!r}, columns={', '.join(known) or 'none'}; "
            + (hint if hint.startswith("did") else "name one of these columns")
        )


def _text(path: Path, where: str, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"data={str(path)!r} {where} column={name!r} holds {type(value).__name__}, not text; name another column"
        )
    return value


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lifts the csv module's limit on a field's length, and puts it back."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
