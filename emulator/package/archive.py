"""A package as one stream of bytes and back: the manifest, then the files in the order of their names, nothing else.

Names and sizes come from the manifest, which the job's digest fixes. So the stream cannot name another path, hold more
files, or grow when it is unpacked.
"""

import shutil
from pathlib import Path
from typing import BinaryIO

from offsite.emulator.package import package_folder
from offsite.emulator.package.manifest import MANIFEST, Manifest
from offsite.errors import DataError, DigestMismatch

LENGTH_BYTES = 8
CHUNK = 1 << 20


def write(folder: Path, target: BinaryIO) -> None:
    """Writes a package folder to a stream."""
    content = package_folder.read_manifest_bytes(folder, None)
    target.write(len(content).to_bytes(LENGTH_BYTES, "big"))
    target.write(content)
    for name in sorted(Manifest.from_bytes(content).files):
        with (folder / name).open("rb") as source:
            shutil.copyfileobj(source, target, CHUNK)


def read(source: BinaryIO, folder: Path, *, expected_digest: str) -> None:
    """Writes the package of a stream into an empty folder, checked byte by byte.

    Args:
      source: the stream that `write` wrote.
      folder: the target folder; must be empty or absent.
      expected_digest: SHA-256 of the package's manifest, 64 hexadecimal digits.

    Raises:
      DigestMismatch: the manifest or a file is not the announced one, or the stream is longer or shorter.
      DataError: the disk does not take the files.
    """
    size = int.from_bytes(source.read(LENGTH_BYTES), "big")
    if size > package_folder.MANIFEST_LIMIT:
        raise DigestMismatch(f"{MANIFEST}: {size} bytes, no manifest is that long; fetch the package again")
    target = package_folder.prepare(folder)
    try:
        (target / MANIFEST).write_bytes(source.read(size))
        announced = Manifest.from_bytes(package_folder.read_manifest_bytes(target, expected_digest)).files
        for name in sorted(announced):
            _copy(source, target / name, announced[name].bytes)
    except OSError as error:
        raise DataError(f"package={str(folder)!r}: cannot be written ({error.strerror}); free disk space") from error
    if source.read(1):
        raise DigestMismatch("package stream goes on after its last file; fetch the package again")
    package_folder.check(target, announced)


def _copy(source: BinaryIO, path: Path, size: int) -> None:
    with path.open("wb") as target:
        while size:
            piece = source.read(min(CHUNK, size))
            if not piece:
                raise DigestMismatch(f"file={path.name!r} ends too early in the package stream; fetch it again")
            target.write(piece)
            size -= len(piece)
