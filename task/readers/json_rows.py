"""Rows of JSON: an object on each line, or a file with one list of objects; SQuAD's articles have many rows each."""

import itertools
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from offsite.task.readers import data_file
from offsite.task.readers.columns import Columns
from offsite.task.readers.data_file import DataFile, lines, opened
from offsite.task.readers.json_list import elements
from offsite.task.readers.rows import Values
from offsite.task.readers.squad_file import questions
from offsite.task.readers.table import Source, fields_of_object
from offsite.task.records import OnFault

TOO_LONG = "is a row of more than {} bytes; make it shorter"


class _TwiceError(Exception):
    """An object has one key twice, and nothing says which value counts."""


def jsonl_sources(file: DataFile, columns: Columns, on_fault: OnFault) -> Iterator[Source]:
    """Yields a row for each line, also for a blank line."""
    with opened(file, on_fault) as content:
        for number, line in enumerate(lines(content), start=1):
            if line is not None and not line.endswith(b"\n") and not line.strip():
                return  # there is no line behind the end of the last line
            place = file.place(f"line={number}")
            if line is None:
                yield place, partial(_fields, file, columns, place, None)
                continue
            for question in questions(line, number, columns):
                where = f"{place} {question.place}".rstrip()
                yield where, partial(_fields, file, columns, where, question.texts)


def json_sources(file: DataFile, columns: Columns, on_fault: OnFault) -> Iterator[Source]:
    """Yields a row for each element of the file's list, or for each question in it; its line is where it starts."""
    rows = itertools.count(1)
    with opened(file, on_fault) as content:
        for number, (line, element) in enumerate(elements(file, content), start=1):
            if element is None:
                place = file.place(f"row={next(rows)} line={line}")
                yield place, partial(_fields, file, columns, place, None)
                continue
            for question in questions(element, line, columns):
                place = file.place(f"row={next(rows)} {_inside(number, question.place)}line={question.line}")
                yield place, partial(_fields, file, columns, place, question.texts)


def _inside(number: int, place: str) -> str:
    """Returns the place of a question with the number of its element; empty for an element that is a row."""
    outer = "article" if place.startswith("paragraph") else "paragraph"
    return f"{outer}={number} {place} " if place else ""


def _fields(file: DataFile, columns: Columns, place: str, texts: Sequence[bytes] | None) -> Values | None:
    """Returns the values of a row by field; None for a blank line.

    Args:
      file: file of the row.
      columns: columns that are read.
      place: place of the row.
      texts: texts of the objects whose members make up the row, an inner key counts before an outer one; None
        where they are too long.

    Raises:
      DataError: a text is no object, or a column is missing.
    """
    if texts is None:
        raise file.error(TOO_LONG.format(data_file.MAX_ROW), place)
    if len(texts) == 1 and texts[0].isspace():
        return None
    row = dict[str, Any]()
    for text in texts:
        row |= _parsed(file, place, text)
    return fields_of_object(file, place, columns, row)


def _parsed(file: DataFile, place: str, text: bytes) -> dict[str, Any]:
    """Returns the object that a text is.

    Raises:
      DataError: the text is no object.
    """
    try:
        row = json.loads(text.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError:  # `from None`: the cause would hold the line
        raise file.error("is not UTF-8; convert it to UTF-8", place) from None
    except _TwiceError:
        raise file.error("has an object with one key twice; keep the right value", place) from None
    except (ValueError, RecursionError):
        raise file.error("is not JSON; write one object a line, or name reader json for a list", place) from None
    if not isinstance(row, dict):
        raise file.error("is not a JSON object; write one object a line", place)
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _TwiceError
    return made
