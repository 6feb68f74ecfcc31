"""Reads a site's records from common file formats; no message here ever holds a record's content."""

import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from offsite.errors import DataError, lookup
from offsite.task.readers.arrow_rows import ARROW_SUFFIXES, arrow_sources, parquet_sources
from offsite.task.readers.columns import Columns, Reader
from offsite.task.readers.csv_rows import csv_sources, tsv_sources
from offsite.task.readers.image_files import image_sources, read_images, read_npz
from offsite.task.readers.image_folder import holds_images, passed_over
from offsite.task.readers.json_rows import json_sources, jsonl_sources
from offsite.task.readers.rows import record_of, strict
from offsite.task.readers.shards import files_of, reader_of
from offsite.task.readers.table import TableFormat
from offsite.task.readers.text_file import text_sources
from offsite.task.records import LenientRecords, OnFault, is_empty
from offsite.task.spec import Record

log = logging.getLogger("offsite.task")
OnNote = Callable[[str], None]  # called with what an owner should know about files that were not read
TABLES: dict[str, TableFormat] = {
    "jsonl": TableFormat((".jsonl", ".ndjson"), jsonl_sources),
    "json": TableFormat((".json",), json_sources),
    "csv": TableFormat((".csv",), csv_sources),
    "tsv": TableFormat((".tsv", ".tab"), tsv_sources),
    "parquet": TableFormat((".parquet",), parquet_sources, packed=False),
    "arrow": TableFormat(ARROW_SUFFIXES, arrow_sources, packed=False),
    "text": TableFormat((".txt",), text_sources, counted=True),
    "image_parquet": TableFormat((".parquet", *ARROW_SUFFIXES), image_sources, packed=False),
}
# Readers that pass over files of other kinds -> function that counts these in one line; all others refuse such files.
PASSING: dict[str, Callable[[Path], str]] = {"images": passed_over}
OF_IMAGES = ("image_parquet",)  # readers that a suffix never chooses
SUFFIXES = {suffix: name for name, form in TABLES.items() if name not in OF_IMAGES for suffix in form.suffixes}
SUFFIXES |= {".npz": "npz"}


def read(path: Path | str, *, reader: str | None, columns: Columns, on_note: OnNote = log.warning) -> list[Record]:
    """Returns the records of a data file or folder in file order, for somebody to whom the file belongs.

    A record whose main field is blank is an empty record, see `task.records.Row`.

    Args:
      path: a file, or a folder of files that are read in order of their names; for reader "images" a folder of folders.
      reader: key of `READERS`, or None to choose the reader by the suffix.
      columns: columns from `columns_of`, the main column first.
      on_note: receives one line about files that are no records.

    Raises:
      DataError: the path is missing or damaged, lacks a column, has a broken row, or holds no record but empty ones.
      UnknownName: there is no such reader.
    """
    records = list(stream(path, reader=reader, columns=columns, on_note=on_note))
    if all(is_empty(record) for record in records):
        raise DataError(f"data={str(path)!r} holds no {next(iter(columns))}; give a file with at least one record")
    return records


def stream(
    path: Path | str,
    *,
    reader: str | None,
    columns: Columns,
    on_fault: OnFault = strict,
    on_note: OnNote = log.warning,
) -> Iterator[Record]:
    """Yields the records of a data file or folder in file order; of a table one row at a time is held.

    Args:
      path: file or folder, as for `read`.
      reader: key of `READERS`, or None to choose the reader by the suffix.
      columns: columns from `columns_of`, the main column first.
      on_fault: receives the fault of each broken row, and raises it, or has the row become an empty record.
      on_note: receives one line about files that are no records.

    Raises:
      DataError: the path is missing, the file is not of its format or lacks a column; and what `on_fault` raises.
      UnknownName: there is no such reader.
    """
    source = Path(path)
    name = _reader(source, reader)
    yield from lookup(READERS, name, "reader")(source, columns, on_fault)
    if note := note_on(source, name):
        on_note(note)


def note_on(path: Path | str, reader: str | None) -> str:
    """Returns one line about files of a folder that are no records; empty where there is none, or each is refused."""
    return PASSING[reader](Path(path)) if reader in PASSING and Path(path).is_dir() else ""


def check_readable(path: Path | str, *, reader: str | None) -> None:
    """Checks what can be said of data before a task is known: each file is there, opens, and is of its format.

    Args:
      path: file or folder, as for `read`.
      reader: key of `READERS`, or None to choose the reader by the suffix.

    Raises:
      DataError: the path is missing, a file cannot be read, or is not of its format.
      UnknownName: there is no such reader.
    """
    source = Path(path)
    name = _reader(source, reader)
    lookup(READERS, name, "reader")
    if name in TABLES:
        for file in files_of(source, TABLES[name]):
            next(TABLES[name].sources(file, {}, strict), None)
    elif not os.access(source, os.R_OK):
        raise DataError(f"data={str(source)!r} cannot be read; give a readable file or folder")


def read_for_job(
    path: Path | str, *, reader: str | None, columns: Columns, on_note: OnNote = log.warning
) -> LenientRecords:
    """Returns the records of a site's data for a job, in file order; a broken row is an empty record.

    The coordinator learns whether a job could be opened, so the content of a row must not decide that. Only facts about
    the file as a whole raise: its path, its format, its columns.

    Args:
      path: file or folder, as for `read`.
      reader: key of `READERS`, or None to choose the reader by the suffix.
      columns: columns from `columns_of`, the main column first.
      on_note: receives one line about files that are no records.

    Raises:
      DataError: the path is missing, the file is not of its format or lacks a column, or there is no row.
      UnknownName: there is no such reader.
    """
    faults: list[str] = []
    rows = stream(
        path, reader=reader, columns=columns, on_fault=lambda error: faults.append(str(error)), on_note=on_note
    )
    records = list(rows)
    if not records:
        raise DataError(f"data={str(path)!r} has no row; give a file with at least one record")
    return LenientRecords(records, faults)


def _read_table(form: TableFormat, path: Path, columns: Columns, on_fault: OnFault) -> Iterator[Record]:
    for file in files_of(path, form):
        for place, fields in form.sources(file, columns, on_fault):
            yield record_of(path, columns, place, fields, on_fault)


READERS: dict[str, Reader] = {
    **{name: partial(_read_table, form) for name, form in TABLES.items()},
    "images": read_images,
    "npz": read_npz,
}


def _reader(source: Path, reader: str | None) -> str:
    if not source.exists():
        raise DataError(f"data={str(source)!r} does not exist; give the path of a data file or folder")
    if reader is None and source.is_dir() and not any(source.glob("*.txt")) and holds_images(source):
        raise DataError(
            f"data={str(source)!r} is a folder of images; name the reader 'images', which reads a folder of images "
            "for each class, or give a Parquet file of encoded images with the reader 'image_parquet'"
        )
    return reader if reader is not None else reader_of(source, SUFFIXES, READERS)
