"""A disk that loses power: it keeps what was synced to it and nothing else."""

import os
import stat
from pathlib import Path

import pytest


class Disk:
    """Watches every `os.fsync` of this process, and rebuilds a folder from what was synced.

    Of a file the disk keeps the content of its last sync, and of a folder the names of its last sync. A file whose name
    was synced and whose content was not is empty, which is the least that a file system promises.

    Args:
      folder: folder whose content counts as synced now.
      monkeypatch: pytest's fixture, which ends the watch.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._real = folder, os.fsync
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        for path in [folder, *folder.rglob("*")]:
            self._keep(path)
        monkeypatch.setattr(os, "fsync", self._fsync)

    def after_power_cut(self, target: Path) -> Path:
        """Writes what the disk has kept into a new folder, and returns the folder."""
        self._rebuild(self._folder.stat().st_ino, target)
        return target

    def _fsync(self, descriptor: int) -> None:
        self._real(descriptor)
        self._keep(Path(f"/proc/self/fd/{descriptor}"))

    def _keep(self, path: Path) -> None:
        facts = path.stat()
        if stat.S_ISDIR(facts.st_mode):
            self._names[facts.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self._contents[facts.st_ino] = path.read_bytes()

    def _rebuild(self, inode: int, target: Path) -> None:
        target.mkdir()
        for name, child in self._names[inode].items():
            if child in self._names:
                self._rebuild(child, target / name)
            else:
                (target / name).write_bytes(self._contents.get(child, b""))
