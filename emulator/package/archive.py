"""A package as one stream of bytes and back: its manifest, then its files in order, with nothing beside them.

Names and sizes come from the manifest, which the job's digest fixes; so the stream cannot name another path, hold more
files, or grow when it is unpacked.
"""

import shutil
from pathlib import Path
from typing import BinaryIO

from offsite.emulator.package import files
from offsite.emulator.package.manifest import MANIFEST, Manifest
from offsite.errors import DataError, DigestMismatch

LENGTH_BYTES = 8
CHUNK = 1 << 20


def write(folder: Path, target: BinaryIO) -> None:
    """Writes a package folder to a stream."""
    content = files.read_manifest_bytes(folder, None)
    target.write(len(content).to_bytes(LENGTH_BYTES, "big"))
    target.write(content)
    for name in sorted(Manifest.from_bytes(content).files):
        with (folder / name).open("rb") as source:
            shutil.copyfileobj(source, target, CHUNK)


def read(source: BinaryIO, folder: Path, *, expected_digest: str) -> None:
    """Writes the package of a stream into an empty folder, checked byte by byte.

    Args:
      source: what `write` wrote.
      folder: where it goes; must be empty or absent.
      expected_digest: SHA-256 of the package's manifest, hexadecimal.

    Raises:
      DigestMismatch: the manifest or a file is another, or the stream is longer or shorter.
      DataError: no room on the disk.
    """
    size = int.from_bytes(source.read(LENGTH_BYTES), "big")
    if size > files.MANIFEST_LIMIT:
        raise DigestMismatch(f"{MANIFEST}: {size} bytes, no manifest is as long; fetch the package again")
    target = files.prepare(folder)
    try:
        (target / MANIFEST).write_bytes(source.read(size))
        announced = Manifest.from_bytes(files.read_manifest_bytes(target, expected_digest)).files
        for name in sorted(announced):
            _copy(source, target / name, announced[name].bytes)
    except OSError as error:
        raise DataError(f"package={str(folder)!r}: cannot be written ({error.strerror}); free disk space") from error
    if source.read(1):
        raise DigestMismatch("package stream goes on after its last file; fetch the package again")
    files.check(target, announced)


def _copy(source: BinaryIO, path: Path, size: int) -> None:
    with path.open("wb") as target:
        while size:
            piece = source.read(min(CHUNK, size))
            if not piece:
                raise DigestMismatch(f"file={path.name!r} ends too early in the package stream; fetch it again")
            target.write(piece)
            size -= len(piece)
