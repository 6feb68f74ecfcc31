"""Files of keys and pins: written whole or not at all, and private files for their owner's eyes only."""

import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offsite.errors import ConfigError, DataError, Untrusted

PRIVATE, PUBLIC = 0o600, 0o644
_OTHERS = 0o077


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Holds a folder for one running process; the folder is free again when that process is gone, however it ended.

    Raises:
      ConfigError: another process holds it.
      DataError: the folder cannot be opened.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise DataError(f"folder={str(folder)!r}: cannot be opened ({error.strerror}); restore it") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"folder={str(folder)!r}: {what} runs here already; stop that process first") from error
        yield
    finally:
        os.close(descriptor)


def make_private(folder: Path) -> None:
    """Makes a folder that only its owner can enter.

    Raises:
      DataError: the folder cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        sync_folder(folder.absolute().parent)
    except OSError as error:
        raise DataError(f"folder={str(folder)!r}: cannot be made ({error.strerror}); choose another place") from error


def write_new(path: Path, content: bytes, *, mode: int = PRIVATE) -> None:
    """Writes a file that must not be there yet; its mode holds from the first byte on.

    Raises:
      ConfigError: the file exists already.
      DataError: the disk is full or the folder cannot be written.
    """
    try:
        _create(path, content, mode)
        sync_folder(path.parent)
    except FileExistsError as error:
        raise ConfigError(f"path={str(path)!r} exists; keys are never overwritten; choose another folder") from error
    except OSError as error:
        raise unwritable(path, error) from error


def write_atomically(path: Path, content: bytes, *, mode: int = PUBLIC) -> None:
    """Replaces a file in one step, on disk before the old one is gone.

    Raises:
      DataError: the disk is full or the folder cannot be written; the old file stands.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        _create(partial, content, mode)
        _name(partial, path)
    except OSError as error:
        raise unwritable(path, error) from error


def put_in_place(partial: Path, path: Path) -> None:
    """Gives a written file its name: its bytes are on disk before, so that a loss of power leaves no torn file there.

    Raises:
      DataError: the disk is full or the folder cannot be written; a file that had the name stands.
    """
    try:
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _name(partial, path)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> DataError:
    """Returns the error for a file that the system does not let us write."""
    return DataError(
        f"path={str(path)!r}: cannot be written ({error.strerror}); free disk space or choose another place"
    )


def why(error: DataError) -> str:
    """Returns the system's reason for a file that could not be written, for a message that does not name its path."""
    cause = error.__cause__
    return str(cause.strerror) if isinstance(cause, OSError) else "it cannot"


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, so that a file that was made or renamed is found after a loss of power.

    Raises:
      OSError: the disk does not take the names.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_private(path: Path) -> bytes:
    """Returns a private file's bytes.

    Raises:
      DataError: there is no such file.
      Untrusted: others than the owner can read the file, so its secret may be known already.
    """
    content = read(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & _OTHERS:
        raise Untrusted(f"path={str(path)!r} has mode {mode:o}; a key must be its owner's alone; chmod 600, or rotate")
    return content


def read(path: Path) -> bytes:
    """Returns a file's bytes.

    Raises:
      DataError: there is no such file, or it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"path={str(path)!r}: cannot be read ({error.strerror}); was the folder initialised?"
        ) from error


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _create(path: Path, content: bytes, mode: int) -> None:
    """Writes a new file to the disk, or leaves no file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _name(partial: Path, path: Path) -> None:
    partial.replace(path)
    sync_folder(path.parent)
