"""The hash chain: every change of its bytes is seen; a crash or full disk at any byte loses no entry that counted."""

import errno
import fcntl
import json
import os
import resource
import struct
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from hashlib import sha256
from pathlib import Path

import pytest

from offsite.errors import ConfigError, DataError
from offsite.trust.chain import NOTHING, Chain

NOW = datetime(2026, 11, 24, 12, 0, 0, 123456, tzinfo=UTC)
FIELDS = ({"a": 1, "b": "ü\n"}, {"a": 2.5, "list": [1, {"x": None}]}, {"a": True})


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """Three entries."""
    made = Chain(tmp_path / "log.jsonl", "a log")
    for number, fields in enumerate(FIELDS):
        made.append(f"kind{number}", fields, now=NOW)
    return made


def again(chain: Chain) -> Chain:
    """Returns the same file, opened by a program that knows nothing of it."""
    return Chain(chain.path, "a log")


def child(work: Callable[[], None]) -> int:
    """Runs work in a process of its own; returns its exit code, 99 for an exception."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_digest_is_what_the_docstring_says(chain: Chain) -> None:
    """By hand, with struct: length-prefixed label, number, previous, time, kind, JSON of the fields."""
    previous = NOTHING
    for number, (link, fields) in enumerate(zip(again(chain).links(), FIELDS, strict=True), 1):
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        parts = [b"a log", struct.pack(">Q", number), previous.encode(), b"2026-11-24T12:00:00.123+00:00"]
        parts += [f"kind{number - 1}".encode(), text.encode()]
        digest = sha256(b"".join(struct.pack(">I", len(part)) + part for part in parts)).hexdigest()
        assert (link.number, link.previous, link.fields, link.digest) == (number, previous, fields, digest)
        previous = digest
    assert again(chain).head() == (3, previous)


def test_an_empty_log_has_no_head_and_makes_no_file(tmp_path: Path) -> None:
    empty = Chain(tmp_path / "none.jsonl", "a log")
    assert (empty.links(), empty.head(), empty.path.exists()) == ([], (0, NOTHING), False)


def test_the_file_is_its_owners_alone(chain: Chain) -> None:
    assert chain.path.stat().st_mode & 0o777 == 0o600


def test_every_changed_added_or_missing_byte_is_seen(chain: Chain) -> None:
    """What still parses is the same log: bytes after the last newline, or a missing newline, change no entry."""
    data, links = chain.path.read_bytes(), chain.links()
    refused: list[tuple[int, str]] = []
    for at in range(len(data)):
        pieces = [bytes([data[at] ^ 1]), bytes([data[at] ^ 128]), b" ", b"\n", b""]
        pieces += [data[at : at + 1] + extra for extra in (b"\r", b"\n", b"0", b" ")]
        for piece in pieces:
            if piece == data[at : at + 1]:
                continue
            chain.path.write_bytes(data[:at] + piece + data[at + 1 :])
            try:
                assert again(chain).links() == links
                assert at == len(data) - 1
                assert piece in (b"", b"\n0", b"\n ", b"\n\r")
            except DataError as error:
                refused.append((data[:at].count(b"\n") + 1, str(error)))
    assert len(refused) > 8 * len(data)
    assert all(f"line={line}:" in text or f"line={line + 1}:" in text for line, text in refused)


def test_the_same_entry_in_other_bytes_is_seen(chain: Chain) -> None:
    data = chain.path.read_bytes()
    for old, new in (
        (b'"number":1,', b'"number":1.0,'),
        (b'"number":1,', b'"number":true,'),
        (b'"number":1,', b'"number":2,"number":1,'),
        (b'"number":1,', b'"more":0,"number":1,'),
        (b'"a":1,', b'"a":1.0,'),
        (b'"a":true', b'"a":1'),
        (b"\\u00fc", "ü".encode()),
        (b"\n", b"\r\n"),
        (b"\n", b"\n" + b"[" * 100_000 + b"\n"),
    ):
        assert old in data
        chain.path.write_bytes(data.replace(old, new, 1))
        with pytest.raises(DataError, match=r"line=\d: not what was written"):
            again(chain).links()


def test_entries_moved_removed_repeated_or_of_another_log_are_seen(chain: Chain) -> None:
    data = chain.path.read_bytes()
    one, two, three = data.splitlines(keepends=True)
    for changed in (two + three, one + three, two + one + three, one + one + two, one + two + two + three):
        chain.path.write_bytes(changed)
        with pytest.raises(DataError):
            again(chain).links()
        with pytest.raises(DataError):
            again(chain).append("kind", {}, now=NOW)
        assert chain.path.read_bytes() == changed
    chain.path.write_bytes(data)
    with pytest.raises(DataError, match="line=1"):
        Chain(chain.path, "another log").head()


def test_a_change_while_the_program_runs_is_seen(chain: Chain) -> None:
    data = chain.path.read_bytes()
    chain.head()
    chain.path.write_bytes(data.replace(b"kind1", b"kind7"))
    with pytest.raises(DataError, match="line=2"):
        chain.append("kind", {}, now=NOW)


def test_a_write_cut_at_any_byte_is_as_if_it_had_not_been(chain: Chain) -> None:
    """An entry that lacks only its newline counts; the next append goes on in either case."""
    data, links = chain.path.read_bytes(), chain.links()
    start = data[:-1].rfind(b"\n") + 1
    for end in range(start, len(data)):
        chain.path.write_bytes(data[:end] + bytes(end % 3))  # zeros, as a power cut leaves them
        before = links if end == len(data) - 1 else links[:2]
        assert again(chain).links() == before
        added = again(chain).append("next", {"end": end}, now=NOW)
        assert again(chain).links() == [*before, added]


def test_a_disk_that_is_full_after_any_byte_adds_nothing(chain: Chain) -> None:
    """The operating system's limit on a file's size stands for the full disk, in a process of its own."""
    data = chain.path.read_bytes()
    needed = len(data.splitlines()[-1]) + 1

    def work() -> None:
        for room in range(needed):
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) + room, resource.RLIM_INFINITY))
            for log in (chain, again(chain)):
                with pytest.raises(DataError, match="free disk space"):
                    log.append("kind2", {"a": True}, now=NOW)
                assert chain.path.read_bytes() == data
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) + needed, resource.RLIM_INFINITY))
        chain.append("kind2", {"a": True}, now=NOW)

    assert child(work) == 0
    assert len(again(chain).links()) == 4


def test_what_the_disk_did_not_confirm_is_not_added(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    data = chain.path.read_bytes()

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(DataError, match="Input/output error"):
        chain.append("kind", {}, now=NOW)
    assert chain.path.read_bytes() == data
    monkeypatch.undo()
    chain.append("kind", {}, now=NOW)
    assert len(again(chain).links()) == 4


def test_an_entry_is_on_disk_before_append_returns(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last call on the file is fsync; for a new file also on its folder."""
    synced: list[tuple[str, bytes]] = []
    real = os.fsync

    def spy(file: int) -> None:
        path = Path(f"/proc/self/fd/{file}").resolve()
        synced.append((path.name, path.read_bytes() if path.is_file() else b""))
        real(file)

    monkeypatch.setattr(os, "fsync", spy)
    new = Chain(chain.path.with_name("new.jsonl"), "a log")
    new.append("kind", {}, now=NOW)
    assert synced == [(chain.path.parent.name, b""), ("new.jsonl", new.path.read_bytes())]


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"

    def work(name: int) -> None:
        log = Chain(path, "a log")
        for number in range(25):
            log.append("kind", {"by": name, "number": number}, now=NOW)

    pids = []
    for name in range(4):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                work(name)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 4
    found = [(link.fields["by"], link.fields["number"]) for link in Chain(path, "a log").links()]
    assert sorted(found) == [(name, number) for name in range(4) for number in range(25)]
    assert all([n for by, n in found if by == name] == list(range(25)) for name in range(4))


def test_a_file_that_was_replaced_behind_the_lock_takes_no_entry(chain: Chain) -> None:
    """Otherwise the entry would go to a file that nobody reads any more."""
    failed: list[BaseException] = []

    def write() -> None:
        try:
            again(chain).append("kind", {}, now=NOW)
        except DataError as error:
            failed.append(error)

    writer = threading.Thread(target=write)
    with chain.locked() as file:
        writer.start()
        while sum(link.resolve() == chain.path for link in Path("/proc/self/fd").iterdir()) < 2:
            time.sleep(0.01)
        chain.path.rename(chain.path.with_name("old.jsonl"))
        fcntl.flock(file, fcntl.LOCK_UN)
        writer.join(10)
    assert "was replaced" in str(failed[0])


def test_a_moment_without_a_zone_is_refused_and_others_are_kept_in_utc(chain: Chain) -> None:
    with pytest.raises(ConfigError, match="time zone"):
        chain.append("kind", {}, now=datetime(2026, 1, 1))
    there = datetime(2026, 1, 1, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    assert chain.append("kind", {}, now=there).time == "2025-12-31T23:30:00.000+00:00"


def test_a_folder_that_is_not_there_is_named_as_the_trouble(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file or directory"):
        Chain(tmp_path / "no" / "log.jsonl", "a log").append("kind", {}, now=NOW)
