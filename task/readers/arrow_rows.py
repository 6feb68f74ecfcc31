"""Rows of Parquet and Arrow files, a few rows at a time; a number that the file's metadata name is that name."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from offsite.task.readers.class_names import class_names, with_names
from offsite.task.readers.columns import Columns
from offsite.task.readers.data_file import DataFile, foreign
from offsite.task.readers.forms import Layout
from offsite.task.readers.rows import UnreadableValue
from offsite.task.readers.table import Source, fields_of, layout_of
from offsite.task.records import OnFault

ARROW_SUFFIXES = (".arrow", ".feather")
ROWS = 256  # rows that are decoded together; each may hold an image
BUFFER = 1 << 20  # bytes of a column that are read together
PARQUET, ARROW, FEATHER_1 = b"PAR1", b"ARROW1", b"FEA1"  # first bytes; Arrow's stream format has none


def parquet_sources(file: DataFile, columns: Columns, on_fault: OnFault) -> Iterator[Source]:
    """Yields the rows of a Parquet file."""
    del on_fault  # whatever the rows hold, the file is of its format
    import pyarrow.parquet  # takes 0.4 s of CPU, and few sites have such a file

    with (
        _readable(file, "Parquet", PARQUET),
        pyarrow.parquet.ParquetFile(file.path, buffer_size=BUFFER, pre_buffer=False) as table,
    ):
        layout = layout_of(file, columns, _names(table.schema_arrow))
        names, places = list(dict.fromkeys(layout.names.values())), _places(file)
        classes = class_names(file.path, table.schema_arrow.metadata)
        for batch in table.iter_batches(batch_size=ROWS, columns=names):
            yield from _rows(file, layout, _named(batch, classes), places)


def arrow_sources(file: DataFile, columns: Columns, on_fault: OnFault) -> Iterator[Source]:
    """Yields the rows of an Arrow file of either kind, as Feather and `datasets` write them."""
    del on_fault
    import pyarrow

    with _readable(file, "Arrow", ARROW) as head, pyarrow.OSFile(str(file.path)) as content:
        if head.startswith(FEATHER_1):
            raise file.error("is Feather version 1; write it as version 2")
        if head.startswith(ARROW):
            table = pyarrow.ipc.open_file(content)
            batches: Iterable[Any] = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            batches = table = pyarrow.ipc.open_stream(content)
        layout = layout_of(file, columns, _names(table.schema))
        tops = [name for name in table.schema.names if _is_read(name, layout.names.values())]
        places, classes = _places(file), class_names(file.path, table.schema.metadata)
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS):
                yield from _rows(file, layout, _named(batch.slice(start, ROWS).select(tops), classes), places)


def _places(file: DataFile) -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield file.place(f"row={number}")


def _is_read(top: str, names: Iterable[str]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for name in names)


def _named(batch: Any, classes: Mapping[str, list[str]]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a `pyarrow.RecordBatch` as column -> value, with the names that the file gives to numbers."""
    names, columns = batch.schema.names, [_values(column) for column in batch.columns]
    for row in zip(*columns, strict=True) if columns else [()] * batch.num_rows:
        yield {name: _with_classes(value, name, classes) for name, value in zip(names, row, strict=True)}


def _with_classes(value: Any, name: str, classes: Mapping[str, list[str]]) -> Any:
    if name in classes:
        return with_names(value, classes[name])
    if not any(column.startswith(f"{name}.") for column in classes):
        return value
    if isinstance(value, list):
        return [_with_classes(part, name, classes) for part in value]
    if isinstance(value, dict):
        return {inner: _with_classes(part, f"{name}.{inner}", classes) for inner, part in value.items()}
    return value


def _rows(file: DataFile, layout: Layout, rows: Iterable[Mapping[str, Any]], places: Iterator[str]) -> Iterator[Source]:
    """Yields rows with their places; `places` goes on behind them."""
    for row in rows:
        place = next(places)
        yield place, partial(fields_of, file, place, layout, row)


def _names(fields: Iterable[Any], outer: str = "") -> list[str]:
    """Returns the names of all columns, and of columns inside of these as `a.b`."""
    import pyarrow

    found = list[str]()
    for field in fields:
        found.append(outer + field.name)
        if pyarrow.types.is_struct(field.type):
            found += _names(field.type, f"{outer}{field.name}.")
    return found


def _values(column: Any) -> list[Any]:
    """Returns the values of a column of a table; all at once where this works, because it is quicker."""
    try:
        values: list[Any] = column.to_pylist()
    except Exception:  # each kind of column fails in its own way
        return [_value(scalar) for scalar in column]
    return values


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except Exception:  # as above, and the way tells about the value
        return UnreadableValue()


@contextmanager
def _readable(file: DataFile, kind: str, start: bytes) -> Iterator[bytes]:
    """Opens a file to look at its first bytes, and turns what a file's library raises into one rule.

    Args:
      file: the file.
      kind: name of its format.
      start: first bytes of this format.

    Raises:
      DataError: the file cannot be read, or is not of its format.
    """
    import pyarrow

    try:
        with file.path.open("rb") as content:
            head = content.read(32)
    except OSError as error:
        raise file.unreadable(error) from None
    try:
        yield head
    except (pyarrow.ArrowException, OSError):
        rule = "" if head.startswith(start) else foreign(head)
        raise file.error(rule or f"is not a readable {kind} file; copy or write it again") from None
