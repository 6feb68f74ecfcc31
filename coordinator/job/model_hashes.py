"""The hashes of a full model's files: a file is read once, and again only after it was changed, replaced or moved."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from offsite.coordinator.job.json_form import decode, encode
from offsite.coordinator.job.store import MODEL_FILES, Store
from offsite.emulator.package.package_folder import model_files
from offsite.errors import DataError
from offsite.trust.files import sha256_file

# The clock of a file system ticks in milliseconds, so a file that was changed just now may change again unseen.
SETTLED = 2.0


@dataclass(frozen=True)
class FileStamp:
    """A file as it was when its hash was taken.

    Attributes:
      device, inode: place of the file, which a copy or a replacement does not share.
      bytes: size of the file.
      changed: time of the last change of content or place in nanoseconds, which the system sets and nobody else.
      sha256: hash of the file, hexadecimal.
    """

    device: int
    inode: int
    bytes: int
    changed: int
    sha256: str = ""

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """Returns the stamp of a file, without its hash."""
        facts = path.stat()
        return cls(facts.st_dev, facts.st_ino, facts.st_size, facts.st_ctime_ns)

    def is_of(self, path: Path) -> bool:
        """Whether a file is the very same, with the same content, as when its hash was taken."""
        return FileStamp.of(path) == replace(self, sha256="")


@dataclass(frozen=True)
class _Kept:
    """Content of `model_files.json`: stamps by file name."""

    files: Mapping[str, FileStamp] = field(default_factory=dict)


def model_hashes(folder: Path, store: Store) -> dict[str, str]:
    """Returns the SHA-256 of each file of a model by name, hexadecimal; unchanged files are not read again.

    Args:
      folder: folder of the full model.
      store: run folder, which keeps the stamps.
    """
    known, stamps = _kept(store), dict[str, FileStamp]()
    for path in model_files(folder):
        seen, now = known.get(path.name), FileStamp.of(path)
        unchanged = seen is not None and seen.is_of(path)
        stamps[path.name] = seen if seen is not None and unchanged else replace(now, sha256=sha256_file(path))
    settled = {
        name: stamp
        for name, stamp in stamps.items()
        if stamp.is_of(folder / name) and stamp.changed < (time.time() - SETTLED) * 1e9
    }
    if settled != known:
        store.write_json(MODEL_FILES, encode(_Kept(settled)))
    return {name: stamp.sha256 for name, stamp in stamps.items()}


def _kept(store: Store) -> Mapping[str, FileStamp]:
    """Returns the stamps of a run folder; without a whole file of them, every file is read."""
    try:
        return decode(_Kept, store.read_json(MODEL_FILES), MODEL_FILES).files
    except DataError:
        return {}
