"""From the values of one row of a data file to one record: an empty record for a blank row, or for a broken one.

A file has as many records as rows, whatever the rows hold. The reader's caller decides about a broken row: where an
owner looks at a file, the first broken row is an error with its place; at an approved job, where every answer reaches
the coordinator, the row becomes an empty record, and only the owner's log names it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from offsite.errors import DataError
from offsite.task.encoded_image import EncodedImage
from offsite.task.label_names import by_table
from offsite.task.readers.columns import Column, Columns
from offsite.task.records import OnFault, Row
from offsite.task.spec import Record

_UNDECODED = re.compile("[\udc80-\udcff]")  # what `surrogateescape` puts in the place of a byte that is not UTF-8
_HALVES = re.compile("[\ud800-\udfff]")  # a surrogate of a pair is no character of its own in a `str`
_OBJECTS = (str, int, np.ndarray, EncodedImage)
_EMPTY: Mapping[type, Any] = {str: "", int: 0, object: None}
_WORDS = {str: "text", int: "a whole number", list: "a list", object: "a name or a whole number"}
Values = Mapping[str, Any]


class Broken(Exception):
    """A row breaks a rule of its form; the text is the rule, and holds nothing of the row."""


class UnreadableValue:
    """Stands for a value that its file's library cannot decode; no column takes this type."""


def rows(
    path: Path, columns: Columns, sources: Iterable[tuple[str, Callable[[], Values]]], on_fault: OnFault
) -> list[Record]:
    """Returns one record for each source, in order.

    Args:
      path: data file, for messages.
      columns: columns that are read, the main column first.
      sources: place of each row, and a function that returns the row's values by column name or raises DataError.
      on_fault: receives the fault of a broken row; where it returns, the row becomes an empty record.
    """
    return [record_of(path, columns, where, partial(_by_field, columns, values), on_fault) for where, values in sources]


def record_of(
    path: Path, columns: Columns, where: str, fields: Callable[[], Values | None], on_fault: OnFault
) -> Record:
    """Returns the record of one row.

    Args:
      path: file or folder that the user named, for messages.
      columns: columns that are read, the main column first.
      where: place of the row.
      fields: function that returns the row's values by field, or None for a row without content, or raises DataError.
      on_fault: receives the fault of a broken row; where it returns, the row becomes an empty record.
    """
    try:
        values = fields()
        row = None if values is None else _checked(path, columns, where, values)
    except DataError as error:
        on_fault(error)
        row = None
    return _empty(path, columns, where) if row is None or _is_blank(row[next(iter(columns))]) else row


def _by_field(columns: Columns, values: Callable[[], Values]) -> Values:
    row = values()
    return {field: row[column.name] for field, column in columns.items()}


def strict(error: DataError) -> None:
    """Raises the fault of a record, for a caller to whom the file belongs."""
    raise error


def text_of(line: str, path: Path, where: str) -> str:
    """Returns a line that was decoded with `surrogateescape`.

    Raises:
      DataError: the line is not UTF-8.
    """
    if not line.isascii() and _UNDECODED.search(line):
        raise DataError(f"data={str(path)!r} {where} is not UTF-8; convert it to UTF-8")
    return line


def _checked(path: Path, columns: Columns, where: str, values: Values) -> Row:
    """Returns a record from the values of a row by field, after a check of their types.

    A form may give further fields than those that are read, which it has checked itself.
    """
    record = dict(values) | {field: _value(values[field], column) for field, column in columns.items()}
    for field, column in columns.items():
        value = record[field]
        fits = isinstance(value, _OBJECTS if column.kind is object else column.kind)
        if not fits or (column.kind is int and isinstance(value, bool)):
            raise DataError(f"data={str(path)!r} {where} column={column.name!r} {_unfit(value, column.kind)}")
    try:
        return Row({field: whole_characters(value) for field, value in record.items()}, where, source=str(path))
    except RecursionError:
        raise DataError(f"data={str(path)!r} {where} is nested too deeply; correct it") from None


def _value(value: Any, column: Column) -> Any:
    """Returns a value in the form of a record: a number like 1.0 as an integer, and a label by the column's table."""
    if column.labels:
        return by_table(value, column.labels)
    return int(value) if column.kind is object and isinstance(value, float) and value.is_integer() else value


def _unfit(value: Any, kind: type) -> str:
    """Returns the rule that a value of another type breaks; an image file in a table has a rule of its own."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if kind is object and content is None and isinstance(value, dict) and value.get("path") is not None:
        return (
            "holds the path of an image file and no image, since only paths are in this file; write the images "
            "themselves into it (reader 'image_parquet'), or give a folder of images for each class (reader 'images')"
        )
    if kind is object and isinstance(content, bytes):
        return (
            "holds an encoded image, which this reader does not read; name the reader 'image_parquet', or 'images' for "
            "a folder of images for each class"
        )
    return f"holds {type(value).__name__}, not {_WORDS[kind]}; correct it, or name another column"


def whole_characters(value: Any) -> Any:
    r"""Returns a value whose texts hold U+FFFD in the place of each lone surrogate.

    JSON can name half of a character, as `"\ud83d"`. Half a character has no UTF-8, so a tokenizer would make nothing
    of the whole text. The number of characters stays, and with it every offset into the text.
    """
    if isinstance(value, str):
        return _HALVES.sub("\ufffd", value) if not value.isascii() and _HALVES.search(value) else value
    if isinstance(value, list):
        return [whole_characters(item) for item in value]
    return {name: whole_characters(item) for name, item in value.items()} if type(value) is dict else value


def _empty(path: Path, columns: Columns, where: str) -> Row:
    fields = {field: [] if column.kind is list else _EMPTY[column.kind] for field, column in columns.items()}
    return Row(fields, where, empty=True, source=str(path))


def _is_blank(value: object) -> bool:
    return not value.strip() if isinstance(value, str) else isinstance(value, list) and not value
