"""An append-only log: each entry carries the hash of the entry before, and is on disk before it counts."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from offsite.errors import ConfigError, DataError
from offsite.trust.files import sync_folder
from offsite.trust.wire import Writer

NOTHING = "0" * 64


@dataclass(frozen=True)
class Link:
    """One entry.

    Attributes:
      number: place in the log, from 1.
      previous: digest of the entry before, hexadecimal; zeros for the first.
      time: the writer's clock, ISO 8601, UTC.
      kind: name of the event.
      fields: plain JSON values.
      digest: SHA-256 over the log's label and every field above, hexadecimal.
    """

    number: int
    previous: str
    time: str
    kind: str
    fields: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class _Tail:
    """Where the next entry goes.

    Attributes:
      number: entries so far.
      digest: digest of the last entry, hexadecimal.
      end: bytes that the entries take.
      open: whether the last entry still lacks its newline.
    """

    number: int
    digest: str
    end: int
    open: bool


class Chain:
    """A hash-chained file of JSON lines.

    A line that a crash cut off was never acted upon: it does not count, and the next append removes it. A line that
    lacks nothing but its newline does count, since too much on record is the safe side. Changing, removing or inserting
    an entry breaks every later hash. Cutting entries off the end is seen only against a head that somebody else keeps.

    Args:
      path: the log's file; made with its first entry, readable by this user only.
      label: name of the log's purpose, so that entries of two logs never stand for each other.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path, self._label = path, label
        self._known: tuple[tuple[int, ...], _Tail] | None = None  # the end only: an audit log is never held whole

    def append(self, kind: str, fields: Mapping[str, Any], *, now: datetime) -> Link:
        """Adds an entry durably, and returns it.

        Raises:
          DataError: the log is damaged, or the disk is full; then nothing was added.
          ConfigError: the time has no zone.
        """
        with self.locked() as file:
            return self.append_locked(file, kind, fields, now=now)

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Opens the file for one writer at a time, so that a check and the entry that follows it are one step.

        Raises:
          DataError: the file cannot be opened, or another file took its place meanwhile.
        """
        file = self._open(os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not self._is_still(file):
                raise DataError(
                    f"log={self.path.name}: the file was replaced while it was opened; leave it alone and try again"
                )
            yield file
        finally:
            os.close(file)

    def append_locked(self, file: int, kind: str, fields: Mapping[str, Any], *, now: datetime) -> Link:
        """Adds an entry while `locked`; see `append`."""
        if now.tzinfo is None:
            raise ConfigError(f"now={now.isoformat()}: a moment needs its time zone; use UTC")
        tail = self._tail(file)
        time = now.astimezone(UTC).isoformat(timespec="milliseconds")
        link = self._next(tail.number, tail.digest, time, kind, json.loads(_canonical(fields)))
        line = (b"\n" if tail.open else b"") + _line(link) + b"\n"
        self._known = None
        try:
            if tail.end == 0:
                sync_folder(self.path.parent)
            os.ftruncate(file, tail.end)
            if os.write(file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)
        except OSError as error:
            _undo(file, tail.end)
            raise DataError(f"log={self.path.name}: cannot be written ({error.strerror}); free disk space") from error
        self._known = _stamp(file), _Tail(link.number, link.digest, tail.end + len(line), False)
        return link

    def links(self) -> list[Link]:
        """Returns all entries, each verified anew.

        Raises:
          DataError: the file cannot be read, or an entry differs from what was written; the message names its line.
        """
        with self._reading() as file:
            return [] if file is None else self._scan(file)[0]

    def links_locked(self, file: int) -> list[Link]:
        """Returns all entries of the file that `locked` opened; see `links`."""
        return self._scan(file)[0]

    def head(self) -> tuple[int, str]:
        """Returns the number of entries and the digest of the last; (0, zeros) for an empty log.

        Raises:
          DataError: as for `links`.
        """
        with self._reading() as file:
            tail = _Tail(0, NOTHING, 0, False) if file is None else self._tail(file)
        return tail.number, tail.digest

    @contextmanager
    def _reading(self) -> Iterator[int | None]:
        if not self.path.exists():
            yield None
            return
        file = self._open(os.O_RDONLY)
        try:
            yield file
        finally:
            os.close(file)

    def _open(self, flags: int) -> int:
        try:
            return os.open(self.path, flags, 0o600)
        except OSError as error:
            raise DataError(
                f"log={self.path.name}: cannot be opened ({error.strerror}); put its folder in order"
            ) from error

    def _is_still(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), self.path.stat())
        except FileNotFoundError:
            return False

    def _tail(self, file: int) -> _Tail:
        """Returns the end of the log, without verifying again an end that this process wrote or read itself."""
        known = self._known
        return known[1] if known is not None and known[0] == _stamp(file) else self._scan(file)[1]

    def _scan(self, file: int) -> tuple[list[Link], _Tail]:
        stamp = _stamp(file)
        *lines, rest = _contents(file, size=stamp[0]).split(b"\n")
        links: list[Link] = []
        for line in lines:
            link = self._parse(line, links)
            if link is None:
                self._refuse(len(links) + 1)
            links.append(link)
        rest = rest.rstrip(b"\0")  # a power cut can leave zeros where bytes were to come
        end, last = sum(len(line) + 1 for line in lines), self._parse(rest, links)
        if last is not None:
            links.append(last)
            end += len(rest)
        elif self._parse(rest[:-1], links) is not None:
            self._refuse(len(links) + 1)  # no crash leaves another byte in a newline's place
        tail = _Tail(len(links), links[-1].digest if links else NOTHING, end, last is not None)
        self._known = stamp, tail
        return links, tail

    def _parse(self, line: bytes, before: list[Link]) -> Link | None:
        """Returns the entry of a line that equals, byte by byte, what `append` writes after these; None for another."""
        try:
            content = json.loads(line)
            time, kind, fields = content["time"], content["kind"], content["fields"]
            link = self._next(len(before), before[-1].digest if before else NOTHING, time, kind, fields)
            return link if _line(link) == line else None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def _next(self, before: int, previous: str, time: str, kind: str, fields: dict[str, Any]) -> Link:
        writer = Writer().text(self._label).number(before + 1).text(previous).text(time).text(kind)
        digest = sha256(writer.text(_canonical(fields)).done()).hexdigest()
        return Link(before + 1, previous, time, kind, fields, digest)

    def _refuse(self, number: int) -> NoReturn:
        raise DataError(
            f"log={self.path.name} line={number}: not what was written there; the log was changed or damaged; "
            "restore it from where it was kept, and find out who changed it"
        )


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _line(link: Link) -> bytes:
    return _canonical(vars(link)).encode()


def _stamp(file: int) -> tuple[int, ...]:
    facts = os.fstat(file)
    return facts.st_size, facts.st_mtime_ns, facts.st_ino, facts.st_dev


def _contents(file: int, *, size: int) -> bytes:
    """Returns the first `size` bytes, or all bytes of a file that has become shorter."""
    content = b""
    while part := os.pread(file, size - len(content), len(content)):
        content += part
    return content


def _undo(file: int, end: int) -> None:
    """Cuts off what a failed append left; if that fails too, a torn or complete entry stays, and both are safe."""
    with suppress(OSError):
        os.ftruncate(file, end)
        os.fsync(file)
