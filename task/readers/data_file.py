"""One file of a data source: its name in messages, and its content as bytes, decompressed and bounded.

The suffix alone says how a file is compressed. A first record that happens to start like a compressed file must not
decide how the other records are read.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from offsite.errors import DataError
from offsite.task.records import OnFault

MAX_ROW = 1 << 28  # bytes of one row; a longer row is broken, and is never held as a whole
MAX_GROWTH = 256  # times that a compressed file may expand; texts grow 3 to 10 times
GROWTH_FROM = 1 << 30  # bytes up to which a file may expand as it likes
BUFFER = 1 << 18  # bytes that are decompressed at a time
MARK = b"\xef\xbb\xbf"  # the byte order mark that some programs write before UTF-8

# First bytes of content that is no text in UTF-8 -> the rule, and the next step.
FOREIGN = {
    b"version https://git-lfs": "is a pointer of Git LFS and not the file itself; fetch the file with git lfs pull",
    b"PAR1": "is a Parquet file; name the reader parquet",
    b"ARROW1": "is an Arrow file; name the reader arrow",
    b"PK\x03\x04": "is a zip archive or a spreadsheet; unpack it, or save the sheet as csv",
    b"\xd0\xcf\x11\xe0": "is a spreadsheet; save the sheet as csv",
    b"\xff\xfe": "is UTF-16; convert it to UTF-8",
    b"\xfe\xff": "is UTF-16; convert it to UTF-8",
    b"\x1f\x8b": "is compressed with gzip; give its name the suffix .gz",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; give its name the suffix .zst",
    b"\xfd7zXZ\x00": "is compressed with xz; give its name the suffix .xz",
    b"BZh91AY&SY": "is compressed with bzip2; give its name the suffix .bz2",
}
_HEAD = 32  # bytes, enough for each of these


@dataclass(frozen=True)
class DataFile:
    """A file of a data source.

    Attributes:
      path: path of the file.
      source: file or folder that the user named.
      label: name of the file in its folder, for messages, as `file='part-1.csv'`; `text=3` in a folder of texts, where
        a file is a record and its name may be private; empty where the user named the file itself.
    """

    path: Path
    source: Path
    label: str = ""

    def place(self, where: str) -> str:
        """Returns the place of a row, for example `file='part-1.csv' line=3`."""
        return f"{self.label} {where}" if self.label else where

    def error(self, rule: str, place: str = "") -> DataError:
        """Returns the error for a file or a row that breaks a rule.

        Args:
          rule: the broken rule, and the next step.
          place: place of the row from `place`; empty for the file as a whole.
        """
        return DataError(" ".join(part for part in (f"data={str(self.source)!r}", place or self.label, rule) if part))

    def unreadable(self, error: OSError) -> DataError:
        """Returns the error for a file that the system does not let us read."""
        return self.error(f"cannot be read ({error.strerror}); give a readable file")


def foreign(head: bytes) -> str:
    """Returns what is wrong with content that starts with these bytes; empty for what may be text."""
    return next((rule for start, rule in FOREIGN.items() if head.startswith(start)), "")


@contextmanager
def opened(file: DataFile, on_fault: OnFault) -> Iterator[io.BufferedReader]:
    """Opens a file of texts; its content is decompressed as its suffix says, and stands behind a byte order mark.

    Args:
      file: the file.
      on_fault: receives what the owner should know about the content as a whole: that it is no text, or that a
        compressed file expands beyond `MAX_GROWTH`. These follow from what rows hold, so at an approved job, where
        `on_fault` returns, the rows are read all the same.

    Raises:
      DataError: the file cannot be read, or is no whole file of its compression.
    """
    try:
        with file.path.open("rb") as raw:
            unpack = PACKED.get(file.path.suffix.lower())
            content = raw if unpack is None else _unpacked(file, raw, unpack, on_fault)
            head = content.peek(_HEAD)[:_HEAD]
            if rule := foreign(head):
                on_fault(file.error(rule))
            content.read(len(MARK) if head.startswith(MARK) else 0)
            yield content
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:  # `from None`: a cause could hold content
        if isinstance(error, OSError) and error.strerror:
            raise file.unreadable(error) from None
        raise file.error(f"is not a whole {file.path.suffix} file; copy or write it again") from None


def lines(content: io.BufferedReader) -> Iterator[bytes | None]:
    """Yields the lines of a content with their ends; None for a line of more than `MAX_ROW` bytes."""
    while line := content.readline(MAX_ROW + 1):
        if len(line) <= MAX_ROW or line.endswith(b"\n"):
            yield line
            continue
        while (rest := content.readline(BUFFER)) and not rest.endswith(b"\n"):
            pass
        yield None


def _unpacked(
    file: DataFile, raw: IO[bytes], unpack: Callable[[IO[bytes]], IO[bytes]], on_fault: OnFault
) -> io.BufferedReader:
    """Returns the decompressed content of a file; the limit on its size counts for the owner who looks."""
    limit = max(GROWTH_FROM, MAX_GROWTH * file.path.stat().st_size)
    error = file.error(
        f"expands to more than {MAX_GROWTH} times its size and {GROWTH_FROM} bytes; check what it holds, and give the "
        "expanded file if this is right"
    )
    return io.BufferedReader(_Counted(unpack(raw), limit, lambda: on_fault(error)), BUFFER)


class _Counted(io.RawIOBase):
    """Bytes of a decompressor; calls a function once, when more than a limit have come."""

    def __init__(self, source: IO[bytes], limit: int, exceeded: Callable[[], None]) -> None:
        self.source, self.left, self.exceeded = source, limit, exceeded

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.source.read(len(buffer))
        buffer[: len(data)] = data
        within, self.left = self.left >= 0, self.left - len(data)
        if within and self.left < 0:
            self.exceeded()
        return len(data)


def _zstd(raw: IO[bytes]) -> IO[bytes]:
    import pyarrow  # takes 0.4 s of CPU, and few sites have such a file

    return cast(IO[bytes], pyarrow.CompressedInputStream(raw, "zstd"))


# Suffix of a compressed file -> function that decompresses the file's content.
PACKED: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".gz": lambda raw: cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="rb")),
    ".zst": _zstd,
    ".bz2": lambda raw: cast(IO[bytes], bz2.BZ2File(raw)),
    ".xz": lambda raw: cast(IO[bytes], lzma.LZMAFile(raw)),  # noqa: SIM115 - its reader closes it
}
