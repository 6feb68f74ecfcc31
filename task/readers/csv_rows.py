"""Rows of separated text, in which a broken row takes no other row with it."""

import csv
import io
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TextIO

from offsite.errors import DataError
from offsite.task.readers import data_file
from offsite.task.readers.columns import Columns
from offsite.task.readers.data_file import BUFFER, DataFile, opened
from offsite.task.readers.forms import Layout
from offsite.task.readers.rows import Values, text_of
from offsite.task.readers.table import Source, fields_of, layout_of
from offsite.task.records import OnFault

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
TAB = {"\t": "tabs"}
LONGEST_FIELD = 2**31 - 1  # characters of a field; the standard library's default limit is 2**17
_NAMED = re.compile(r'"?sep=(.)"?\r?\n')  # a first line that tells Excel the separator


def csv_sources(file: DataFile, columns: Columns, on_fault: OnFault) -> Iterator[Source]:
    """Yields a row for each row behind the header, also for a blank row.

    The header alone decides about the separator: the comma where that finds the columns, else what does.
    """
    yield from _sources(file, columns, on_fault, SEPARATORS)


def tsv_sources(file: DataFile, columns: Columns, on_fault: OnFault) -> Iterator[Source]:
    """Yields the rows of a file that is separated by tabs; else as `csv_sources`."""
    yield from _sources(file, columns, on_fault, TAB)


def _sources(file: DataFile, columns: Columns, on_fault: OnFault, separators: dict[str, str]) -> Iterator[Source]:
    with opened(file, on_fault) as content:
        lines = _Lines(io.TextIOWrapper(content, encoding="utf-8", errors="surrogateescape", newline=""))
        separator, header = _header(file, columns, lines, separators)
        layout = layout_of(file, columns, header)
        held = {name: at for at, name in enumerate(header) if name in layout.names.values()}
        decoded = {layout.names[field] for field, column in columns.items() if column.kind in (int, list)}
        for line, cells in _rows(lines, separator, len(header)):
            place = file.place(f"line={line}")
            yield place, partial(_fields, file, place, layout, held, decoded, cells)


def _header(file: DataFile, columns: Columns, lines: "_Lines", separators: dict[str, str]) -> tuple[str, list[str]]:
    """Takes the first row, and returns the separator and the names of the columns.

    Raises:
      DataError: the row is not CSV, or two separators find the columns.
    """
    if named := _NAMED.fullmatch(lines.peek()):
        next(lines)
        lines.keep()
        separators = {named.group(1): "separators"}
    headers = {separator: _names(file, lines, separator) for separator in separators}
    fit = [separator for separator, header in headers.items() if _finds(file, columns, header)]
    if len(fit) > 1 and fit[0] != ",":
        shown = " and ".join(separators[separator] for separator in fit)
        raise file.error(f"line=1 has the columns with {shown} as separators; write the file with commas")
    separator = fit[0] if fit else max(headers, key=lambda separator: len(headers[separator]))
    _, header = next(_rows(lines, separator, 0), (0, []))
    if isinstance(header, str):
        raise file.error(header, file.place("line=1"))
    return separator, headers[separator]


def _names(file: DataFile, lines: "_Lines", separator: str) -> list[str]:
    """Returns the names of the columns with a separator, none where the first row is not CSV; takes no line."""
    try:
        header = next(_reader(lines, separator), [])
    except csv.Error:
        header = []
    lines.back(0)
    return [text_of(name, file.source, file.place("line=1")) for name in header]


def _finds(file: DataFile, columns: Columns, header: list[str]) -> bool:
    try:
        layout_of(file, columns, header)
    except DataError:
        return False
    return True


def _reader(lines: "_Lines", separator: str) -> Iterator[list[str]]:
    return csv.reader(lines, delimiter=separator, strict=True)


def _rows(lines: "_Lines", separator: str, width: int) -> Iterator[tuple[int, list[str] | str]]:
    """Yields each row's last line, from 1, with its cells, or with the rule that it breaks; a blank row has no cells.

    Of a broken row only the first line is taken, and the next line starts a new row: a quote that one record opens and
    never closes would else take all records behind it.

    Args:
      lines: lines of the file.
      separator: separator of the cells.
      width: number of cells of each row; 0 for any.
    """
    rows = _reader(lines, separator)
    while True:
        before = csv.field_size_limit(LONGEST_FIELD)
        try:
            cells: list[str] | str = next(rows)
        except StopIteration:
            return
        except _TooLongError:
            cells = f"is a row of more than {data_file.MAX_ROW} characters; make it shorter"
        except csv.Error:
            cells = "is not CSV; check its quotes"
        finally:
            csv.field_size_limit(before)
        if not isinstance(cells, str) and cells and width and len(cells) != width:
            held = SEPARATORS.get(separator, "separators")
            cells = f"has {len(cells)} fields, must have {width}, as the header; quote texts that hold {held}"
        if isinstance(cells, str):
            lines.back(1)
        lines.keep()
        yield lines.at, cells


def _fields(
    file: DataFile,
    place: str,
    layout: Layout,
    held: dict[str, int],
    decoded: set[str],
    cells: Sequence[str] | str,
) -> Values | None:
    """Returns the values of a row by field; None for a blank row, or a question without an answer.

    Args:
      file: file of the row.
      place: place of the row.
      layout: columns of the fields.
      held: name of each column that is read -> its place in a row.
      decoded: names of the columns of numbers, lists and objects, whose cells are JSON.
      cells: cells of the row, none for a blank row; or the rule that the row breaks.

    Raises:
      DataError: the row breaks a rule.
    """
    if isinstance(cells, str):
        raise file.error(cells, place)
    if not cells:
        return None
    texts = {name: text_of(cells[at], file.source, place) for name, at in held.items()}
    return fields_of(file, place, layout, {name: _json(text) if name in decoded else text
                                           for name, text in texts.items()})  # fmt: skip


def _json(cell: str) -> Any:
    """Returns a cell's value; the cell itself where it is no JSON, which no column of numbers or lists takes."""
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


class _TooLongError(csv.Error):
    """A row is longer than `data_file.MAX_ROW`."""


class _Lines(Iterator[str]):
    """Lines of a text, from which the csv module reads rows; the lines of the row at hand can be given back.

    Attributes:
      at: number of lines that were taken.
    """

    def __init__(self, text: TextIO) -> None:
        self._text, self._ahead = text, deque[str]()
        self._row, self._size, self.at = list[str](), 0, 0

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else self._read()
        if not line:
            raise StopIteration
        self.at += 1
        self._row.append(line)
        self._size += len(line)
        if self._size > data_file.MAX_ROW:
            raise _TooLongError
        return line

    def peek(self) -> str:
        """Returns the next line, empty at the end."""
        if not self._ahead and (line := self._read()):
            self._ahead.append(line)
        return self._ahead[0] if self._ahead else ""

    def keep(self) -> None:
        """Ends the row at hand."""
        self._row.clear()
        self._size = 0

    def back(self, kept: int) -> None:
        """Gives back the lines of the row at hand, but for the first `kept`."""
        self._ahead.extendleft(reversed(self._row[kept:]))
        self.at -= len(self._row[kept:])
        self.keep()

    def _read(self) -> str:
        line = self._text.readline(data_file.MAX_ROW + 1)
        if len(line) > data_file.MAX_ROW and not line.endswith(("\n", "\r")):
            while (rest := self._text.readline(BUFFER)) and not rest.endswith(("\n", "\r")):
                pass
        return line
