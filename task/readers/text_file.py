"""A file that is one text."""

from collections.abc import Iterator

from offsite.task.readers import data_file
from offsite.task.readers.columns import Columns
from offsite.task.readers.data_file import DataFile, opened
from offsite.task.readers.rows import Values
from offsite.task.readers.table import Source, fields_of, layout_of
from offsite.task.records import OnFault

COLUMN = "text"  # the only column of a folder of texts


def text_sources(file: DataFile, columns: Columns, on_fault: OnFault) -> Iterator[Source]:
    """Yields the content of a file as one row."""
    layout, place = layout_of(file, columns, [COLUMN]), file.label or "text=1"

    def fields(content: bytes) -> Values | None:
        if len(content) > data_file.MAX_ROW:
            raise file.error(f"is a text of more than {data_file.MAX_ROW} bytes; cut it into several", place)
        try:
            return fields_of(file, place, layout, {COLUMN: content.decode()})
        except UnicodeDecodeError:  # `from None`: the cause would hold the text
            raise file.error("is not UTF-8; convert it to UTF-8", place) from None

    with opened(file, on_fault) as stream:
        content = stream.read(data_file.MAX_ROW + 1)
    yield place, lambda: fields(content)
