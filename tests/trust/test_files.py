"""Files that are there whole or not at all, also where the power goes between two writes."""

import os
from pathlib import Path

import pytest

from offsite.errors import DataError
from offsite.trust import files


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes | None
) -> None:
    path, synced = tmp_path / "file", list[tuple[int, bytes | None]]()
    if old is not None:
        path.write_bytes(old)
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, path.read_bytes() if path.exists() else None))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    files.write_atomically(path, b"new")
    assert (path.stat().st_ino, old) in synced
    assert synced[-1] == (tmp_path.stat().st_ino, b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_old_file_and_is_said(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    partial = tmp_path / f".file.{os.getpid()}.partial"
    partial.mkdir()
    with pytest.raises(DataError, match="cannot be written") as caught:
        files.write_atomically(path, b"new")
    assert files.why(caught.value) in (os.strerror(21), os.strerror(1))  # a folder is there
    assert path.read_bytes() == b"old"


def test_a_place_that_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "partial").write_bytes(b"x")
    with pytest.raises(DataError, match="No such file or directory"):
        files.put_in_place(tmp_path / "partial", tmp_path / "nowhere" / "file")
    assert (tmp_path / "partial").read_bytes() == b"x"
