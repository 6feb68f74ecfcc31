"""Cuts a file that holds one list of JSON, alone or in an object, into the texts of its elements, one at a time.

An element ends at a comma or bracket outside of its strings and brackets, whatever else stands in it, so that a broken
element is one broken row. A fault of the list itself is a fault of the file.
"""

import json
import re
from collections.abc import Iterator
from io import BufferedReader

from offsite.task.readers import data_file
from offsite.task.readers.data_file import DataFile

CHUNK = 1 << 18  # bytes that are looked at together
_MARKS = re.compile(rb'["\[\]{},]')
_ELEMENT = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)  # inside of an element, no bracket
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)  # the rest of a string up to its quote
_KEY = re.compile(rb'\s*"((?:[^"\\]++|\\.)*+)"\s*:\s*', re.DOTALL)
# Keys of an object under which tools put the list of records: the parts of a data set, and names for all of it.
LISTS: tuple[str, ...] = ("data", "records", "instances", "examples", "samples", "rows", "items", "train", "training")
LISTS += ("validation", "valid", "val", "dev", "test", "eval")
_ALONE = "the file"
NO_LIST = (
    f"is neither one JSON list nor one object with the list under one of the keys {', '.join(LISTS)}; for one object a "
    "line name reader jsonl, else write the file again"
)


def elements(file: DataFile, content: BufferedReader) -> Iterator[tuple[int, bytes | None]]:
    """Yields the line where each element of a list starts, from 1, and the element's text; None for too long a text.

    The list is the file, or stands in one object under a key of `LISTS`.

    Args:
      file: the file, for messages.
      content: content of the file, which is read in chunks.

    Raises:
      DataError: the content is not one list, and holds not one list.
    """
    marks, element, around = _Marks(), _Element(), _Around(file)
    count = 0
    for chunk in _chunks(content):
        begin = 0
        for at in marks.of(chunk):
            element.add(chunk[begin:at])
            begin = at + 1
            mark = chunk[at:begin]
            if not around.inside:
                around.take(mark, marks, element)
                element.next()
                continue
            ends = mark == b"]" and marks.depth == marks.level
            if element.blank and ends and not count:
                element.next()
            elif element.blank or not (ends or mark == b","):
                raise file.error(NO_LIST)
            else:
                count += 1
                yield element.next()
            if ends:
                around.leave(marks)
        element.add(chunk[begin:])
        if not element.blank and not marks.depth:
            raise file.error(NO_LIST)
    if not around.closed or not around.found or not element.blank:
        raise file.error(NO_LIST)


class _Around:
    """What stands around the list: nothing, or an object with further members.

    Attributes:
      inside: whether the marks at hand are those of the list.
      found: key of the list, or `_ALONE`; empty before the list.
      closed: whether the list, or the object around it, has ended.
    """

    def __init__(self, file: DataFile) -> None:
        self._file, self.inside, self.found, self.closed = file, False, "", False
        self._members = 0
        self._valued = False  # whether the list or object that is the value of a member has just ended

    def leave(self, marks: "_Marks") -> None:
        """Notes the end of the list."""
        self.inside, self._valued, self.closed = False, True, not marks.level

    def take(self, mark: bytes, marks: "_Marks", element: "_Element") -> None:
        """Takes a mark that is not the list's own, with the text in front of it.

        Raises:
          DataError: the object breaks a rule of JSON, or has two lists.
        """
        opens, depth = mark in b"[{", marks.depth
        if self.closed:
            raise self._file.error(NO_LIST)
        if opens and depth == 1:
            if not element.blank:
                raise self._file.error(NO_LIST)
            self.inside, self.found, marks.level = mark == b"[", _ALONE * (mark == b"["), int(mark == b"{")
        elif opens:
            self._open(mark, element)
        elif depth == 1 and mark != b",":
            self._valued = True
        elif depth < 2:
            self._end_member(mark, element)
            self.closed = mark != b","

    def _open(self, mark: bytes, element: "_Element") -> None:
        key = _KEY.fullmatch(element.text() or b"")
        if key is None or self._valued:
            raise self._file.error(NO_LIST)
        name = key.group(1).decode(errors="replace")
        if mark == b"[" and name in LISTS:
            if self.found:
                raise self._file.error(
                    f"has two lists of records, {self.found!r} and {name!r}; put each into a file of its own"
                )
            self.inside, self.found = True, name

    def _end_member(self, mark: bytes, element: "_Element") -> None:
        """Checks the member in front of a comma or of the object's end; a list or an object was checked before."""
        if not self._is_member(mark, element) or mark not in b",}":
            raise self._file.error(NO_LIST)
        self._valued, self._members = False, self._members + 1

    def _is_member(self, mark: bytes, element: "_Element") -> bool:
        if self._valued or (element.blank and mark == b"}" and not self._members):
            return element.blank
        try:
            return len(json.loads(b"{" + (element.text() or b"") + b"}")) == 1
        except (ValueError, RecursionError):
            return False


def _chunks(content: BufferedReader) -> Iterator[bytes]:
    """Yields the content in chunks, none of which ends inside of an escape."""
    while chunk := content.read(CHUNK):
        while chunk.endswith(b"\\") and (more := content.read(1)):
            chunk += more
        yield chunk


class _Marks:
    """The brackets and commas of the list itself, and of the object around it.

    Attributes:
      depth: number of brackets that are open.
      level: number of brackets around the list.
    """

    def __init__(self) -> None:
        self.depth, self.level, self._quoted = 0, 0, False

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
            if self.depth > self.level + 1 and (rest := _ELEMENT.match(chunk, at)):
                at = rest.end()
            mark = _MARKS.search(chunk, at)
            if mark is None:
                return
            at = mark.end()
            self._quoted = mark.group() == b'"'
            before = self.depth
            self.depth += (mark.group() in b"[{") - (mark.group() in b"]}")
            of_list = min(before, self.depth) <= self.level or (before == self.level + 1 and mark.group() == b",")
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

    def text(self) -> bytes | None:
        """Returns the text so far; None where it is too long."""
        return b"".join(self._pieces).strip(b" \t\r\n") if self._size <= data_file.MAX_ROW else None

    def next(self) -> tuple[int, bytes | None]:
        """Returns line and text of the element, and starts the next one."""
        line, text = self._line + self._lead, self.text()
        self._line += self._newlines
        self._lead, self._pieces, self._size, self._newlines, self.blank = 0, [], 0, 0, True
        return line, text
