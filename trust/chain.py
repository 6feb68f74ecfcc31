"""A log that only grows: each entry carries the hash of the one before, and is on disk before it counts."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from errors import DataError
from trust.wire import Writer

NOTHING = "0" * 64
_KEYS = ("number", "previous", "time", "kind", "fields", "digest")


@dataclass(frozen=True)
class Link:
    """One entry.

    Attributes:
      number: from 1.
      previous: digest of the entry before, hexadecimal; zeros for the first.
      time: ISO 8601, as the writer's clock had it.
      kind: what it is about.
      fields: plain JSON values.
      digest: SHA-256 over all of the above and the log's label, hexadecimal.
    """

    number: int
    previous: str
    time: str
    kind: str
    fields: dict[str, Any]
    digest: str


class Chain:
    """A hash-chained file of JSON lines.

    A line that a crash cut off was never acted upon, and is removed by the next append. Changing, removing or inserting
    an entry breaks every later hash; cutting whole entries off the end is seen only against a head that somebody else
    keeps.

    Args:
      path: the file; made with its first entry, readable by this user only.
      label: what the log is, so that entries of two logs never stand for each other.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path, self._label = path, label
        self._known: tuple[tuple[int, int, int], list[Link]] | None = None

    def append(self, kind: str, fields: Mapping[str, Any], *, now: datetime) -> Link:
        """Adds an entry, durably, and returns it.

        Raises:
          DataError: the log is damaged, or the disk is full; then nothing was added.
        """
        with self.locked() as file:
            return self.append_locked(file, kind, fields, now=now)

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Opens the file for one writer at a time, so that a check and the entry that follows it are one step."""
        new = not self.path.exists()
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise DataError(f"log={self.path.name}: cannot be opened ({error.strerror}); free disk space") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if new:
                _sync_directory(self.path.parent)
            yield file
        finally:
            os.close(file)

    def append_locked(self, file: int, kind: str, fields: Mapping[str, Any], *, now: datetime) -> Link:
        """Adds an entry while `locked`; see `append`."""
        links = self._read(file)
        previous = links[-1].digest if links else NOTHING
        time = now.isoformat(timespec="milliseconds")
        content = json.loads(_canonical(fields))
        digest = self._digest(len(links) + 1, previous, time, kind, content)
        link = Link(len(links) + 1, previous, time, kind, content, digest)
        line = (_canonical({name: getattr(link, name) for name in _KEYS}) + "\n").encode()
        whole = os.fstat(file).st_size
        torn = _torn(file, whole)
        if torn:
            whole -= torn
            os.ftruncate(file, whole)
        try:
            written = os.write(file, line)
            if written != len(line):
                raise OSError(28, "No space left on device")
            os.fsync(file)
        except OSError as error:
            os.ftruncate(file, whole)
            raise DataError(f"log={self.path.name}: cannot be written ({error.strerror}); free disk space") from error
        self._known = (_stamp(file), [*links, link])
        return link

    def links(self) -> list[Link]:
        """Returns all entries, verified.

        Raises:
          DataError: an entry is not the one that was written; the message names its line.
        """
        if not self.path.exists():
            return []
        file = os.open(self.path, os.O_RDONLY)
        try:
            return list(self._read(file))
        finally:
            os.close(file)

    def head(self) -> tuple[int, str]:
        """Returns how many entries there are, and the digest of the last."""
        links = self.links()
        return (links[-1].number, links[-1].digest) if links else (0, NOTHING)

    def _read(self, file: int) -> list[Link]:
        stamp = _stamp(file)
        if self._known is not None and self._known[0] == stamp:
            return self._known[1]
        data = os.pread(file, stamp[1], 0)
        links: list[Link] = []
        for line in data[: data.rfind(b"\n") + 1].splitlines():
            links.append(self._link(line, links))
        self._known = (stamp, links)
        return links

    def _link(self, line: bytes, before: list[Link]) -> Link:
        number, previous = len(before) + 1, before[-1].digest if before else NOTHING
        try:
            content = json.loads(line)
            link = Link(**content)
            whole = _canonical(content).encode() == line and content.keys() == set(_KEYS)
            digest = self._digest(number, previous, link.time, link.kind, link.fields)
        except (ValueError, TypeError, AttributeError):
            whole, link, digest = False, None, ""
        if link is None or not whole or (link.number, link.previous, link.digest) != (number, previous, digest):
            raise DataError(
                f"log={self.path.name} line={number}: not what was written there; the log was changed or damaged; "
                "restore it from where it was kept, and find out who changed it"
            )
        return link

    def _digest(self, number: int, previous: str, time: str, kind: str, fields: dict[str, Any]) -> str:
        writer = Writer().text(self._label).number(number).text(previous).text(time).text(kind)
        return sha256(writer.text(_canonical(fields)).done()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _stamp(file: int) -> tuple[int, int, int]:
    facts = os.fstat(file)
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _torn(file: int, size: int) -> int:
    """Returns how many bytes after the last newline a crash left."""
    data = os.pread(file, size, 0)
    return len(data) - (data.rfind(b"\n") + 1)


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
