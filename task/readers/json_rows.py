"""Rows of JSON: an object on each line, or a file that is one list of objects."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from offsite.task.readers import data_file
from offsite.task.readers.columns import Columns
from offsite.task.readers.data_file import DataFile, lines, opened
from offsite.task.readers.json_list import elements
from offsite.task.readers.rows import Values
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
            yield place, partial(_fields, file, columns, place, line)


def json_sources(file: DataFile, columns: Columns, on_fault: OnFault) -> Iterator[Source]:
    """Yields a row for each element of a list; its line is where the element starts."""
    with opened(file, on_fault) as content:
        for number, (line, element) in enumerate(elements(file, content), start=1):
            place = file.place(f"row={number} line={line}")
            yield place, partial(_fields, file, columns, place, element)


def _fields(file: DataFile, columns: Columns, place: str, text: bytes | None) -> Values | None:
    """Returns the values of a JSON object by field; None for a blank line.

    Args:
      file: file of the row.
      columns: columns that are read.
      place: place of the row.
      text: text of the object; None where it is too long.

    Raises:
      DataError: the text is no object, or a column is missing.
    """
    if text is None:
        raise file.error(TOO_LONG.format(data_file.MAX_ROW), place)
    if text.isspace():
        return None
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
    return fields_of_object(file, place, columns, row)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _TwiceError
    return made
