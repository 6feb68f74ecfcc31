"""A site's memory that must survive a crash: the last round that the site entered, and the updates that it uploaded."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from offsite.errors import DataError, ProtocolViolation
from offsite.trust.files import sync_folder


class Journal(Protocol):
    """The memory of one site; both methods return only when the entry is durable."""

    def claim(self, federation: str, epoch: int, round: int) -> None:
        """Enters a round; refuses a round that is not newer than the last round of its federation."""

    def spend(self, digest: bytes) -> None:
        """Records an update as uploaded; refuses an update that was uploaded before."""


class MemoryJournal:
    """A journal that ends with the process; for tests and simulations."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, int]] = {}
        self._spent: set[bytes] = set()

    def claim(self, federation: str, epoch: int, round: int) -> None:
        """Enters a round.

        Raises:
          ProtocolViolation: the epoch is older than the last epoch, or the round is not newer within its epoch.
        """
        last = self._last.get(federation)
        if last is not None and (epoch, round) <= last:
            raise ProtocolViolation(
                f"round={round} epoch={epoch} is not newer than round={last[1]} epoch={last[0]}; rounds only go up; "
                "open a new round under the current manifest"
            )
        self._last[federation] = (epoch, round)

    def spend(self, digest: bytes) -> None:
        """Records an update as uploaded.

        Raises:
          ProtocolViolation: the update was uploaded before.
        """
        if digest in self._spent:
            raise ProtocolViolation(
                "update was uploaded before; a second upload, with another cohort, could reveal it; train again"
            )
        self._spent.add(digest)


class FileJournal:
    """A journal in an append-only file, one JSON line per entry, fsynced before a method returns.

    A line that a crash cut off was never acted upon and is removed. A restored old copy of the file makes the site
    forget, so keep the file out of backups.

    Args:
      path: the journal's file; made with its first entry.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)

    def claim(self, federation: str, epoch: int, round: int) -> None:
        """Enters a round, durably.

        Raises:
          ProtocolViolation: the epoch is older than the last epoch, or the round is not newer within its epoch.
          DataError: the file is damaged, or the disk is full.
        """
        with self._locked() as file:
            self._read(file).claim(federation, epoch, round)
            _append(file, ["round", federation, epoch, round])

    def spend(self, digest: bytes) -> None:
        """Records an update as uploaded, durably.

        Raises:
          ProtocolViolation: the update was uploaded before.
          DataError: the file is damaged, or the disk is full.
        """
        with self._locked() as file:
            self._read(file).spend(digest)
            _append(file, ["spent", digest.hex()])

    @contextmanager
    def _locked(self) -> Iterator[int]:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not os.fstat(file).st_size:  # also where a killed process made the file, and no entry counts yet
                sync_folder(self._path.parent)
            yield file
        finally:
            os.close(file)

    def _read(self, file: int) -> MemoryJournal:
        data = os.pread(file, os.fstat(file).st_size, 0)
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            os.ftruncate(file, whole)
        memory = MemoryJournal()
        try:
            for line in data[:whole].splitlines():
                match json.loads(line):
                    case ["round", str(federation), int(epoch), int(round_)]:
                        memory.claim(federation, epoch, round_)
                    case ["spent", str(digest)]:
                        memory.spend(bytes.fromhex(digest))
                    case other:
                        raise ValueError(other)
        except (ValueError, ProtocolViolation) as error:
            raise DataError(
                f"journal={self._path} is damaged; sign a new epoch, then remove the file, which is about the old epoch"
            ) from error
        return memory


def _append(file: int, entry: list[object]) -> None:
    line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
    try:
        if os.write(file, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file)
    except OSError as error:
        raise DataError(f"journal cannot be written ({error.strerror}); free disk space, the round is lost") from error
