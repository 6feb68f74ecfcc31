"""Rows of comma-separated text, in which a broken row takes no other row with it."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offsite.errors import DataError
from offsite.task.readers.columns import Columns
from offsite.task.readers.rows import Values, text_of

LONGEST_FIELD = 2**31 - 1  # characters of a csv field; the standard library's default limit is 2**17


class _Lines(Iterator[str]):
    """Lines of a text, from which the csv module reads rows; `at` is the number of lines taken, and may be set back."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines, self.at = lines, 0

    def __next__(self) -> str:
        if self.at >= len(self.lines):
            raise StopIteration
        self.at += 1
        return self.lines[self.at - 1]


def csv_rows(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yields each row's last line, from 1, with its cells, or with the rule that it breaks; a blank row has no cells.

    All rows have as many cells as the first. Of a broken row only the first line is taken, and the next line starts a
    new row: a quote that one record opens and never closes would else take all records behind it.
    """
    lines = _Lines(list(io.StringIO(text, newline="")))
    with _long_fields():
        rows, width = csv.reader(lines, strict=True), 0
        while lines.at < len(lines.lines):
            start = lines.at
            try:
                cells: list[str] | str = next(rows, [])
            except csv.Error:
                cells = "is not CSV; check its quotes"
            if not isinstance(cells, str) and cells and width and len(cells) != width:
                cells = f"has {len(cells)} fields, must have {width}, as the header; quote texts that hold commas"
            if isinstance(cells, str):
                lines.at = start + 1
            width = width or len(cells)
            yield lines.at, cells


def values_of(path: Path, where: str, columns: Columns, header: Sequence[str], cells: Sequence[str] | str) -> Values:
    """Returns the values of a row by column name; columns of numbers and lists are decoded from JSON.

    Args:
      path: data file, for messages.
      where: place of the row, for messages.
      columns: columns that are read.
      header: names of all columns.
      cells: cells of the row, none for a blank row; or the rule that the row breaks.

    Raises:
      DataError: the row breaks a rule.
    """
    if isinstance(cells, str):
        raise DataError(f"data={str(path)!r} {where} {cells}")
    if not cells:
        return {column.name: "" if column.kind is object else column.kind() for column in columns.values()}
    texts = {column.name: text_of(cells[header.index(column.name)], path, where) for column in columns.values()}
    return {
        column.name: _json(texts[column.name]) if column.kind in (int, list) else texts[column.name]
        for column in columns.values()
    }


def _json(cell: str) -> Any:
    """Returns a cell's value; the cell itself where it is no JSON, which no column of numbers or lists takes."""
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lifts the csv module's limit on the length of a field, and restores the limit at the end."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
