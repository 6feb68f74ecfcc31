"""Each update is written down before it leaves, in words that hold no data; without that entry no update leaves."""

import dataclasses
import json
import math
import os
import resource
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offsite.adapter.layout import Layout
from offsite.adapter.spec import AdapterSpec
from offsite.client.home.audit import Audit, verify
from offsite.client.site.egress import EgressReport, release
from offsite.client.site.release_log import LedgerReleaseLog, Release, ledger_name
from offsite.errors import DataError, OffsiteError, PrivacyRefusal, RangeError
from offsite.privacy.accountants import ACCOUNTANTS
from offsite.privacy.events import Event
from offsite.privacy.ledger import Ledger
from offsite.protos.job_manifest import JobManifest, PrivacyTerms

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
EVENT, DELTA = Event(1.1, 0.05, 10), 1e-3
LAYOUT = Layout(("h.0.lora_B", "h.1.lora_B"), ((3, 2), (4, 2)))
JOB = JobManifest(
    federation="demo",
    epoch=1,
    roster=(("east", "aa"), ("north", "bb"), ("west", "cc")),
    n_min=3,
    accomplices=1,
    task="causal_lm",
    emulator="e1" * 32,
    base="b1" * 32,
    tokenizer="71" * 32,
    adapter=AdapterSpec("ffa_lora", rank=2, slots=("h.0", "h.1")),
    layout=LAYOUT,
    length=32,
    split="blocks",
    rounds=2,
    local_steps=10,
    learning_rate=0.1,
    update_bound=1.0,
    privacy=PrivacyTerms(private=True, epsilon=4.0, max_grad_norm=1.0, accountant="pld", batch=16),
    physical_batch=8,
)
UPDATE = np.linspace(-0.731, 0.419, LAYOUT.size).astype(np.float32)
GOOD: dict[str, Any] = {
    "job": "ab" * 32,
    "round": 1,
    "tensors": tuple(zip(LAYOUT.names, LAYOUT.shapes, strict=True)),
    "upload_bytes": 4 * LAYOUT.size,
    "norm": 1.5,
    "epsilon_round": 0.1,
    "epsilon_total": 0.3,
    "delta": DELTA,
}


@pytest.fixture
def audit(tmp_path: Path) -> Audit:
    return Audit(tmp_path / "audit.jsonl")


@pytest.fixture
def release_log(tmp_path: Path, audit: Audit) -> LedgerReleaseLog:
    """The release log of a real site, with a ledger, an audit log and a clock that moves."""
    ledger = Ledger(tmp_path / "ledger.jsonl", dataset="patients", epsilon_cap=8.0, delta=DELTA, accountant="rdp")
    whole = dataclasses.replace(EVENT, steps=EVENT.steps * JOB.releases)
    ledger.reserve(whole, job=JOB.digest().hex(), delta=DELTA, records=320, now=NOW)
    times = iter(NOW + timedelta(minutes=minute) for minute in range(100))
    return LedgerReleaseLog(ledger, JOB, audit=audit, clock=lambda: next(times))


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def spends(folder: Path) -> int:
    return sum(entry["kind"] == "spend" for entry in entries(folder / "ledger.jsonl"))


def going(number: int, update: np.ndarray = UPDATE, event: Event | None = EVENT, size: int = LAYOUT.size) -> Release:
    return Release(number, event, update, 4 * size)


def in_a_child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_report_says_all_that_leaves(tmp_path: Path, release_log: LedgerReleaseLog) -> None:
    """Names, shapes, bytes, norm and epsilon, each by another route; the ledger's head goes to the coordinator."""
    for number in (1, 2):
        head = release_log.release(going(number))
        account = ACCOUNTANTS["rdp"]
        total, before = account([EVENT] * number, DELTA), account([EVENT] * (number - 1), DELTA)
        entry, spent = entries(tmp_path / "audit.jsonl")[-1], entries(tmp_path / "ledger.jsonl")[-1]
        assert entry["kind"] == "egress"
        assert entry["fields"] == {
            "job": JOB.digest().hex(),
            "round": number,
            "tensors": [["h.0.lora_B", [3, 2]], ["h.1.lora_B", [4, 2]]],
            "upload_bytes": 56,
            "norm": pytest.approx(math.sqrt(math.fsum(float(x) ** 2 for x in UPDATE)), rel=1e-12),
            "epsilon_round": pytest.approx(total - before),
            "epsilon_total": pytest.approx(total),
            "delta": DELTA,
        }
        assert head is not None
        assert (head.count, head.head) == (1 + number, spent["digest"])
        assert head.ledger == ledger_name("patients")
        assert "patients" not in head.ledger
    assert verify(tmp_path / "audit.jsonl") == 2


def test_no_value_of_the_update_is_written_down(tmp_path: Path, release_log: LedgerReleaseLog) -> None:
    """No number in log or ledger is near an entry of the update, and no bytes of the update stand in either file."""
    release_log.release(going(1))
    text = (tmp_path / "audit.jsonl").read_text() + (tmp_path / "ledger.jsonl").read_text()
    found: list[float] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict | list):
            for one in value.values() if isinstance(value, dict) else value:
                walk(one)
        elif isinstance(value, float):
            found.append(value)

    for line in text.splitlines():
        walk(json.loads(line))
    assert len(found) > 4
    assert all(abs(abs(number) - abs(float(entry))) > 1e-6 for number in found for entry in UPDATE)
    assert UPDATE.tobytes().hex()[:16] not in text


def test_releases_beyond_the_planned_ones_or_without_privacy_stay_here(
    tmp_path: Path, release_log: LedgerReleaseLog
) -> None:
    with pytest.raises(PrivacyRefusal, match="private=false"):
        release_log.release(going(1, event=None))
    with pytest.raises(PrivacyRefusal, match="private=false"):
        release_log.check(None)
    assert spends(tmp_path) == 0
    release_log.release(going(1))
    release_log.release(going(1))  # the same round again is a release again
    for refused in (lambda: release_log.check(EVENT), lambda: release_log.release(going(2))):
        with pytest.raises(PrivacyRefusal, match="planned for 2"):
            refused()
    assert spends(tmp_path) == len(entries(tmp_path / "audit.jsonl")) == 2


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (going(1, size=LAYOUT.size + 1), RangeError, "upload_bytes=60"),
        (going(1, size=0), RangeError, "upload_bytes=0"),
        (going(1, np.full(LAYOUT.size, np.nan, np.float32)), RangeError, "not finite"),
        (going(1, np.full(LAYOUT.size, np.inf, np.float32)), RangeError, "not finite"),
    ],
)
def test_what_was_not_announced_stays_here(
    tmp_path: Path, release_log: LedgerReleaseLog, bad: Release, error: type[OffsiteError], words: str
) -> None:
    """The debit stands, on the safe side; the log has no egress."""
    with pytest.raises(error, match=words):
        release_log.release(bad)
    assert entries(tmp_path / "audit.jsonl") == []
    assert spends(tmp_path) == 1


def test_a_report_that_fits_is_written_whole(tmp_path: Path, audit: Audit) -> None:
    release(EgressReport(**GOOD), LAYOUT, audit, now=NOW)
    assert entries(tmp_path / "audit.jsonl")[0]["fields"] == json.loads(json.dumps(GOOD))


def test_nothing_leaves_when_the_log_is_full(tmp_path: Path, release_log: LedgerReleaseLog, audit: Audit) -> None:
    """The log is longer than the ledger, so a limit on file size fills it first; the debit stands, nothing left."""
    audit.record("filler", now=NOW, text="x" * 2000)
    size = (tmp_path / "audit.jsonl").stat().st_size

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
        with pytest.raises(DataError, match="free disk space"):
            release_log.release(going(1))

    assert in_a_child(work) == 0
    assert (tmp_path / "audit.jsonl").stat().st_size == size
    assert spends(tmp_path) == 1


def test_nothing_leaves_when_the_ledger_is_full(tmp_path: Path, release_log: LedgerReleaseLog) -> None:
    def work() -> None:
        size = (tmp_path / "ledger.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
        with pytest.raises(DataError, match="free disk space"):
            release_log.release(going(1))

    assert in_a_child(work) == 0
    assert spends(tmp_path) == 0
    assert entries(tmp_path / "audit.jsonl") == []


def test_nothing_leaves_when_log_or_ledger_was_changed(tmp_path: Path, release_log: LedgerReleaseLog) -> None:
    release_log.release(going(1))
    for name in ("audit.jsonl", "ledger.jsonl"):
        path = tmp_path / name
        data = path.read_bytes()
        path.write_bytes(data.replace(b'"round":1', b'"round":2'))
        with pytest.raises(DataError, match=f"log={name} line={1 + (name == 'ledger.jsonl')}"):
            release_log.release(going(2))
        if name == "audit.jsonl":
            with pytest.raises(DataError, match="line=1"):
                verify(path)
        path.write_bytes(data)


def test_an_audit_log_that_is_not_there_has_no_entries(tmp_path: Path) -> None:
    assert verify(tmp_path / "none.jsonl") == 0
