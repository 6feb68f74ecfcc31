"""Cuts a file that holds one list of JSON into the texts of its elements, one at a time.

An element ends at a comma or bracket outside of its strings and brackets, whatever else stands in it, so that a broken
element is one broken row. A fault of the list itself is a fault of the file.
"""

import re
from collections.abc import Iterator
from io import BufferedReader

from offsite.task.readers import data_file
from offsite.task.readers.data_file import DataFile

CHUNK = 1 << 18  # bytes that are looked at together
_MARKS = re.compile(rb'["\[\]{},]')
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)  # the rest of a string up to its quote
NO_LIST = "is not one JSON list; for one object a line name reader jsonl, else write the file again"


def elements(file: DataFile, content: BufferedReader) -> Iterator[tuple[int, bytes | None]]:
    """Yields the line where each element of a list starts, from 1, and the element's text; None for too long a text.

    Args:
      file: the file, for messages.
      content: content of the file, which is read in chunks.

    Raises:
      DataError: the content is not one list.
    """
    marks, element, count = _Marks(), _Element(), 0
    for chunk in _chunks(content):
        begin = 0
        for at in marks.of(chunk):
            element.add(chunk[begin:at])
            begin = at + 1
            mark = chunk[at:begin]
            opens, ends = mark == b"[" and marks.depth == 1, mark == b"]" and marks.depth == 0
            if element.blank and (opens or (ends and not count)) and not marks.closed:
                element.next()
            elif element.blank or marks.closed or not (ends or mark == b","):
                raise file.error(NO_LIST)
            else:
                count += 1
                yield element.next()
            marks.closed = marks.closed or ends
        element.add(chunk[begin:])
        if not element.blank and not marks.depth:
            raise file.error(NO_LIST)
    if not marks.closed or not element.blank:
        raise file.error(NO_LIST)


def _chunks(content: BufferedReader) -> Iterator[bytes]:
    """Yields the content in chunks, none of which ends inside of an escape."""
    while chunk := content.read(CHUNK):
        while chunk.endswith(b"\\") and (more := content.read(1)):
            chunk += more
        yield chunk


class _Marks:
    """The brackets and commas of the list itself.

    Attributes:
      depth: number of brackets that are open.
      closed: whether the list has ended.
    """

    def __init__(self) -> None:
        self.depth, self.closed, self._quoted = 0, False, False

    def of(self, chunk: bytes) -> Iterator[int]:
        """Yields the positions in the next chunk; `depth` is then the depth behind the mark."""
        at = 0
        while at < len(chunk):
            if self._quoted:
                rest = _STRING.match(chunk, at)
                at = rest.end() if rest else at
                self._quoted = at == len(chunk)
                at += 1
                continue
            mark = _MARKS.search(chunk, at)
            if mark is None:
                return
            at = mark.end()
            self._quoted = mark.group() == b'"'
            before = self.depth
            self.depth += (mark.group() in b"[{") - (mark.group() in b"]}")
            of_list = min(before, self.depth) <= 0 or (before == 1 and mark.group() == b",")
            if of_list and not self._quoted:
                yield at - 1


class _Element:
    """The text of an element, as far as it was read; of too long a text only its lines are counted."""

    def __init__(self) -> None:
        self._line, self._lead, self._pieces = 1, 0, list[bytes]()
        self._size, self._newlines = 0, 0
        self.blank = True

    def add(self, piece: bytes) -> None:
        if self.blank:
            rest = piece.lstrip(b" \t\r\n")
            self._lead += piece.count(b"\n", 0, len(piece) - len(rest))
            self.blank = not rest
        self._size += len(piece)
        self._newlines += piece.count(b"\n")
        self._pieces.append(piece)
        if self._size > data_file.MAX_ROW:
            self._pieces.clear()

    def next(self) -> tuple[int, bytes | None]:
        """Returns line and text of the element, and starts the next one."""
        line = self._line + self._lead
        text = b"".join(self._pieces).strip(b" \t\r\n") if self._size <= data_file.MAX_ROW else None
        self._line += self._newlines
        self._lead, self._pieces, self._size, self._newlines, self.blank = 0, [], 0, 0, True
        return line, text
