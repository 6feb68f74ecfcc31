"""After a cut of power a site and a coordinator still know what they promised to remember."""

import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from offsite.client.home.audit import Audit, verify
from offsite.coordinator.rounds.counter import MonotonicCounter
from offsite.errors import ProtocolViolation
from offsite.secagg.journal import FileJournal
from offsite.trust import files
from offsite.trust.chain import Chain
from tests.power import Disk

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
UPDATE, OTHER = b"\1" * 32, b"\2" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "site").mkdir()
    return tmp_path / "site"


@pytest.fixture
def disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(folder, monkeypatch)


def test_the_disk_forgets_what_was_not_synced(folder: Path, disk: Disk, tmp_path: Path) -> None:
    """A disk that kept everything would pass every test below."""
    for name in ("a", "b"):
        with (folder / name).open("wb") as file:
            file.write(b"whole")
            file.flush()
            if name == "b":
                os.fsync(file.fileno())
    assert list(disk.after_power_cut(tmp_path / "no names").iterdir()) == []
    files.sync_folder(folder)
    after = disk.after_power_cut(tmp_path / "names")
    assert {path.name: path.read_bytes() for path in after.iterdir()} == {"a": b"", "b": b"whole"}


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_spent_update_stays_spent(folder: Path, disk: Disk, tmp_path: Path, before: int) -> None:
    """Without it the update would go to a second cohort, and the difference of two sums is one site's."""
    journal = FileJournal(folder / "journal.jsonl")
    for number in range(before):
        journal.claim("fed", 1, number + 1)
    journal.spend(UPDATE)
    after = FileJournal(disk.after_power_cut(tmp_path / "after") / "journal.jsonl")
    with pytest.raises(ProtocolViolation, match="uploaded before"):
        after.spend(UPDATE)
    after.spend(OTHER)


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_round_stays_claimed(folder: Path, disk: Disk, tmp_path: Path, before: int) -> None:
    journal = FileJournal(folder / "journal.jsonl")
    for number in range(before + 1):
        journal.claim("fed", 1, number + 1)
    after = FileJournal(disk.after_power_cut(tmp_path / "after") / "journal.jsonl")
    with pytest.raises(ProtocolViolation, match="rounds only go up"):
        after.claim("fed", 1, before + 1)


def test_a_journal_that_a_kill_left_empty_gets_its_name_on_the_disk(
    folder: Path, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill comes after the file was made and before its name was synced, so the next process syncs the name."""
    if (pid := os.fork()) == 0:
        monkeypatch.setattr("offsite.secagg.journal.sync_folder", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        FileJournal(folder / "journal.jsonl").spend(OTHER)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert (folder / "journal.jsonl").read_bytes() == b""
    FileJournal(folder / "journal.jsonl").spend(UPDATE)
    after = FileJournal(disk.after_power_cut(tmp_path / "after") / "journal.jsonl")
    with pytest.raises(ProtocolViolation, match="uploaded before"):
        after.spend(UPDATE)


def test_a_folder_that_is_made_again_is_on_the_disk(folder: Path, disk: Disk, tmp_path: Path) -> None:
    """As `SiteHome.open` makes `state` again, which many a backup leaves out where it is empty."""
    files.make_private(folder / "state")
    FileJournal(folder / "state" / "journal.jsonl").spend(UPDATE)
    after = FileJournal(disk.after_power_cut(tmp_path / "after") / "state" / "journal.jsonl")
    with pytest.raises(ProtocolViolation, match="uploaded before"):
        after.spend(UPDATE)


@pytest.mark.parametrize("entries", [1, 2])
def test_every_entry_of_a_log_is_there(folder: Path, disk: Disk, tmp_path: Path, entries: int) -> None:
    chain, audit = Chain(folder / "ledger-main.jsonl", "label"), Audit(folder / "audit.jsonl")
    for number in range(entries):
        head = chain.append("spend", {"number": number}, now=NOW).digest
        audit.record("egress", now=NOW, number=number)
    after = disk.after_power_cut(tmp_path / "after")
    assert Chain(after / "ledger-main.jsonl", "label").head() == (entries, head)
    assert verify(after / "audit.jsonl") == entries


def test_a_number_does_not_come_again(folder: Path, disk: Disk, tmp_path: Path) -> None:
    counter = MonotonicCounter(folder / "letters.txt", clock_ns=lambda: 5)
    given = [counter.next() for _ in range(3)]
    after = MonotonicCounter(disk.after_power_cut(tmp_path / "after") / "letters.txt", clock_ns=lambda: 5)
    assert after.next() > max(given)


def _new(path: Path) -> None:
    files.write_new(path, b"whole")


def _atomic(path: Path) -> None:
    files.write_atomically(path, b"whole")


def _placed(path: Path) -> None:
    path.with_name("partial").write_bytes(b"whole")
    files.put_in_place(path.with_name("partial"), path)


@pytest.mark.parametrize("write", [_new, _atomic, _placed])
def test_a_file_is_there_whole(folder: Path, disk: Disk, tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(folder / "file")
    assert (disk.after_power_cut(tmp_path / "after") / "file").read_bytes() == b"whole"


@pytest.mark.parametrize("write", [_atomic, _placed])
def test_a_replaced_file_is_the_old_one_or_the_new_one_at_every_moment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    (folder / "file").write_bytes(b"older")
    disk, seen = Disk(folder, monkeypatch), []
    sync = os.fsync

    def cut_after(descriptor: int) -> None:
        sync(descriptor)
        seen.append((disk.after_power_cut(tmp_path / f"after {len(seen)}") / "file").read_bytes())

    monkeypatch.setattr(os, "fsync", cut_after)
    write(folder / "file")
    assert seen[0] == b"older"
    assert seen[-1] == b"whole"
    assert set(seen) == {b"older", b"whole"}
