"""The one path from a data file to records that all formats of tables take.

bytes, decompressed (`task.readers.data_file`) -> rows (a file for each format) -> columns (`task.readers.forms`) ->
records (`task.readers.rows`). One row at a time is held.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from offsite.task.readers.columns import Columns, check_columns
from offsite.task.readers.data_file import DataFile
from offsite.task.readers.forms import Layout, Missing, has, names_in
from offsite.task.readers.rows import Broken, Values
from offsite.task.records import OnFault

# A row: its place, and a function that returns its values by field, or None for a row without content, or raises.
Source = tuple[str, Callable[[], Values | None]]


@dataclass(frozen=True)
class TableFormat:
    """A format of files with rows.

    Attributes:
      suffixes: suffixes of such files, in small letters.
      sources: function that yields the rows of a file; it raises DataError for what is wrong with the file as a whole.
      packed: whether a file may be compressed as a whole.
      counted: whether messages count the files of a folder and never name them, because a file is a record.
    """

    suffixes: tuple[str, ...]
    sources: Callable[[DataFile, Columns, OnFault], Iterator[Source]]
    packed: bool = True
    counted: bool = False


def layout_of(file: DataFile, columns: Columns, present: list[str], place: str = "") -> Layout:
    """Returns where the fields of a record stand, in a file or in one row with these columns.

    Raises:
      DataError: a column is missing, or stands there twice.
    """
    layout = Layout.of(columns, set(present).__contains__)
    wanted = {field: replace(column, name=layout.names[field]) for field, column in columns.items()}
    check_columns(file.source, wanted, present, place or file.label)
    return layout


def fields_of(file: DataFile, place: str, layout: Layout, row: Mapping[str, Any]) -> Values | None:
    """Returns the values of a row by field; None for a row from which nothing can be learnt.

    Args:
      file: file of the row.
      place: place of the row.
      layout: columns of the file.
      row: column -> value.

    Raises:
      DataError: a value is missing, or is not of its form.
    """
    try:
        return layout.fields(row)
    except Missing as error:
        raise file.error(f"column={str(error)!r} is not in this row; correct the row", place) from None
    except Broken as error:
        raise file.error(str(error), place) from None


def fields_of_object(file: DataFile, place: str, columns: Columns, row: Mapping[str, Any]) -> Values | None:
    """Returns the values of a row whose columns are its own, as in JSON; arguments as for `fields_of`.

    Raises:
      DataError: a column is missing, or a value is not of its form.
    """
    layout = Layout.of(columns, lambda name: has(row, name))
    if not all(has(row, name) for name in layout.names.values()):
        layout = layout_of(file, columns, names_in(row), place)
    return fields_of(file, place, layout, row)
