"""The privacy ledger: the recorded spending is never less than the releases, through kills, full disks and restores."""

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from offsite.errors import ConfigError, DataError, PrivacyRefusal, ProtocolViolation, UnknownName
from offsite.privacy.accountants import ACCOUNTANTS
from offsite.privacy.events import Event, compose
from offsite.privacy.ledger import Ledger
from offsite.trust.chain import Chain
from offsite.trust.countersign import check_countersigned, countersign
from offsite.trust.identity import Identity

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
EVENT, OTHER = Event(1.1, 0.05, 10), Event(0.8, 0.02, 7)
DELTA = 1e-5


@pytest.fixture(autouse=True)
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches the real accountant's sums, so that processes forked from this one need not compute them again."""
    real = ACCOUNTANTS["rdp"]
    sums: dict[tuple[Event, ...], float] = {}

    def account(events: Sequence[Event], delta: float) -> float:
        assert delta == DELTA
        key = tuple(compose(events))
        if key not in sums:
            sums[key] = real(events, delta)
        return sums[key]

    monkeypatch.setitem(ACCOUNTANTS, "rdp", account)


def opened(path: Path, *, cap: float = 8.0, dataset: str = "records", accountant: str = "rdp") -> Ledger:
    return Ledger(path, dataset=dataset, epsilon_cap=cap, delta=DELTA, accountant=accountant)


def debited(ledger: Ledger, times: int, event: Event = EVENT, job: str = "job") -> None:
    for number in range(times):
        ledger.debit(event, job=job, round=number + 1, now=NOW)


def forked(work: Callable[[], None]) -> int:
    """Starts work in a process of its own; returns its id."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# What is spent


def test_two_jobs_add_up_as_dp_accounting_composes_them(tmp_path: Path) -> None:
    """Compared with dp-accounting's composed event, in another order, round by round, on a ten times finer grid."""
    ledger = opened(tmp_path / "l.jsonl", accountant="pld")
    for number in range(3):
        debited(ledger, 1, EVENT, "first")
        debited(ledger, number, OTHER, "second")
    rounds = [OTHER] * 3 + [EVENT] * 3
    steps = [
        dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(e.sample_rate, dp_accounting.GaussianDpEvent(e.noise_multiplier)),
            e.steps,
        )
        for e in rounds
    ]
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(dp_accounting.ComposedDpEvent(steps))
    assert ledger.spent() == pytest.approx(accountant.get_epsilon(DELTA), abs=2e-3)
    assert (ledger.releases("first"), ledger.releases("second"), ledger.releases("third")) == (3, 3, 0)


def test_what_is_recorded_is_what_is_spent(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "l.jsonl")
    assert ledger.recorded() == 0.0
    for event in (EVENT, OTHER, EVENT):
        debited(ledger, 1, event)
        assert opened(tmp_path / "l.jsonl").recorded() == ledger.spent() > 0


@pytest.mark.parametrize(
    ("delta", "total", "recorded"), [(DELTA, 1.25, 1.25), (DELTA, 1, 1.0), (DELTA / 2, 1.25, None), (None, 1.25, None)]
)
def test_an_epsilon_recorded_at_another_delta_is_computed_again(
    tmp_path: Path, delta: float | None, total: float, recorded: float | None
) -> None:
    fields = {"job": "job", "round": 1, "noise_multiplier": EVENT.noise_multiplier, "sample_rate": EVENT.sample_rate}
    fields |= {"steps": EVENT.steps, "epsilon_total": total} | ({} if delta is None else {"delta": delta})
    Chain(tmp_path / "l.jsonl", "offsite privacy ledger records").append("spend", fields, now=NOW)
    ledger = opened(tmp_path / "l.jsonl")
    assert ledger.recorded() == (ACCOUNTANTS["rdp"]([EVENT], DELTA) if recorded is None else recorded)


@pytest.mark.parametrize("total", [None, "1.25", True])
def test_an_entry_without_its_epsilon_is_not_taken_for_none(tmp_path: Path, total: object) -> None:
    fields = {"job": "job", "round": 1, "noise_multiplier": EVENT.noise_multiplier, "sample_rate": EVENT.sample_rate}
    fields |= {"steps": EVENT.steps, "delta": DELTA, "epsilon_total": total}
    Chain(tmp_path / "l.jsonl", "offsite privacy ledger records").append("spend", fields, now=NOW)
    with pytest.raises(DataError, match="entry 1 is unknown to this release"):
        opened(tmp_path / "l.jsonl").recorded()


def test_a_debit_says_what_stands_in_the_ledger(tmp_path: Path) -> None:
    ledger, total = opened(tmp_path / "l.jsonl"), 0.0
    assert (ledger.spent(), ledger.head()[0]) == (0.0, 0)
    for number in range(1, 5):
        projected = ledger.check(EVENT)
        spend = ledger.debit(EVENT, job="job", round=1, now=NOW)  # the same round again makes another entry
        assert (spend.number, spend.head) == ledger.head()
        assert spend.number == number
        assert spend.epsilon_total == projected == ledger.spent() == opened(tmp_path / "l.jsonl").spent()
        assert spend.epsilon_total == ACCOUNTANTS["rdp"]([EVENT] * number, DELTA)
        assert spend.epsilon_round == pytest.approx(spend.epsilon_total - total, abs=1e-12)
        total = spend.epsilon_total


def test_checking_enters_nothing(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "l.jsonl")
    ledger.check(EVENT)
    assert (ledger.spent(), ledger.head()[0], ledger.releases("job")) == (0.0, 0, 0)


def test_the_cap_is_met_and_never_passed(tmp_path: Path) -> None:
    """The ledger permits as many releases as brute force; check and debit both refuse the next one."""
    permitted = next(n for n in range(1, 100) if ACCOUNTANTS["rdp"]([EVENT] * (n + 1), DELTA) > 2.5)
    ledger = opened(tmp_path / "l.jsonl", cap=2.5)
    debited(ledger, permitted)
    assert permitted > 2
    before = (tmp_path / "l.jsonl").read_bytes()
    for refused in (lambda: ledger.check(EVENT), lambda: debited(ledger, 1)):
        with pytest.raises(PrivacyRefusal, match=r"epsilon=2\.5\d* after this release: the cap .* is 2\.5, and 2\."):
            refused()
    assert (tmp_path / "l.jsonl").read_bytes() == before
    opened(tmp_path / "l.jsonl", cap=2.6).check(EVENT)


def test_a_release_without_noise_worth_the_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyRefusal, match="below the floor"):
        debited(opened(tmp_path / "l.jsonl", cap=1e9), 1, Event(0.1, 0.01, 1))
    assert opened(tmp_path / "l.jsonl").head()[0] == 0


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cap_that_caps_nothing_is_refused(tmp_path: Path, cap: float) -> None:
    with pytest.raises(ConfigError, match="epsilon_cap"):
        opened(tmp_path / "l.jsonl", cap=cap)


def test_other_bad_terms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="delta"):
        Ledger(tmp_path / "l.jsonl", dataset="records", epsilon_cap=1.0, delta=1.0, accountant="rdp")
    with pytest.raises(UnknownName, match="accountant"):
        opened(tmp_path / "l.jsonl", accountant="gdp")


def test_hundreds_of_rounds_stay_fast(tmp_path: Path) -> None:
    """Processor time of a check and its debit after 300 entries; without merged events PLD would take 20 s each."""
    path, event = tmp_path / "l.jsonl", Event(4.0, 0.01, 5)
    debited(opened(path), 1, event)
    chain = Chain(path, "offsite privacy ledger records")
    for _ in range(299):
        chain.append("spend", chain.links()[0].fields, now=NOW)
    ledger, began = opened(path, accountant="pld"), os.times().user
    assert ledger.check(event) == ledger.debit(event, job="job", round=301, now=NOW).epsilon_total
    assert os.times().user - began < 2.0
    assert ledger.spent() == pytest.approx(ACCOUNTANTS["pld"]([Event(4.0, 0.01, 5 * 301)], DELTA))


# Killed


def killed_at(line: int, work: Callable[[], None]) -> int:
    """Runs work in a process that dies by SIGKILL before the given line of the ledger or its chain is executed."""

    def run() -> None:
        left = [line]

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            if not frame.f_code.co_filename.endswith(("trust/chain.py", "privacy/ledger.py")):
                return None
            if event == "line":
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        work()
        sys.settrace(None)

    return ended(forked(run))


@pytest.mark.slow
@pytest.mark.parametrize("already", [0, 2])
def test_killed_at_any_line_the_record_covers_every_release(tmp_path: Path, already: int) -> None:
    """A real process, kill -9 before each line of check and debit; another file records its releases."""
    start = tmp_path / "start.jsonl"
    debited(opened(start), already)
    account, entered, at = ACCOUNTANTS["rdp"], set(), 0
    while True:
        at += 1
        path, outbox = tmp_path / "l.jsonl", tmp_path / "outbox"
        path.unlink(missing_ok=True)
        if already:
            shutil.copy(start, path)
        outbox.write_bytes(b"x" * already)

        def work(path: Path = path, outbox: Path = outbox) -> None:
            ledger = opened(path)
            ledger.check(EVENT)
            ledger.debit(EVENT, job="job", round=9, now=NOW)
            with outbox.open("ab") as file:
                file.write(b"x")
            ledger.spent()

        code = killed_at(at, work)
        ledger, released = opened(path), len(outbox.read_bytes())
        assert ledger.spent() >= account([EVENT] * released, DELTA)
        assert ledger.head()[0] in (released, released + 1)
        entered.add((ledger.head()[0] - already, released - already))
        debited(ledger, 1)
        assert opened(path).spent() >= account([EVENT] * (released + 1), DELTA)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert at > 100
    assert entered == {(0, 0), (1, 0), (1, 1)}  # before the write, between write and release, and after it


def test_a_process_that_dies_holding_the_lock_does_not_hold_up_the_next(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    debited(opened(path), 1)

    def work() -> None:
        with Chain(path, "offsite privacy ledger records").locked():
            os.kill(os.getpid(), signal.SIGKILL)

    assert ended(forked(work)) == -signal.SIGKILL
    debited(opened(path), 1)
    assert opened(path).head()[0] == 2


def test_a_full_disk_releases_nothing(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    debited(opened(path), 1)
    size, before = path.stat().st_size, path.read_bytes()

    def work() -> None:
        for room in (0, 1, size // 2, size - 2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, resource.RLIM_INFINITY))
            with pytest.raises(DataError, match="free disk space"):
                debited(opened(path), 1)

    assert ended(forked(work)) == 0
    assert path.read_bytes() == before
    assert opened(path).head()[0] == 1


# Several at once


def test_two_programs_on_one_ledger_do_not_pass_the_cap_together(tmp_path: Path) -> None:
    """Each sees room for its release; only one of them gets the last room."""
    permitted = next(n for n in range(1, 100) if ACCOUNTANTS["rdp"]([EVENT] * (n + 1), DELTA) > 2.5)

    def work() -> None:
        ledger = opened(tmp_path / "l.jsonl", cap=2.5)
        with pytest.raises(PrivacyRefusal, match="cap"):
            debited(ledger, 100)

    pids = [forked(work) for _ in range(3)]
    assert [ended(pid) for pid in pids] == [0] * 3
    ledger = opened(tmp_path / "l.jsonl")
    assert ledger.head()[0] == permitted
    assert ledger.spent() <= 2.5


# Restored, forked, changed


def test_a_restored_old_copy_is_seen_against_what_the_coordinator_signed(tmp_path: Path) -> None:
    path, old, coordinator = tmp_path / "l.jsonl", tmp_path / "old", Identity.generate()
    debited(opened(path), 2)
    shutil.copy(path, old)
    debited(opened(path), 2)
    count, head = opened(path).head()
    signature = countersign(coordinator, "north", "ledger", count, head)
    check_countersigned(coordinator.public, "north", "ledger", count, head, signature)
    for newer in range(2):  # also when the ledger has grown since
        debited(opened(path), newer)
        opened(path).check_against(count, head)
    shutil.copy(old, path)
    with pytest.raises(PrivacyRefusal, match="has 2 entries, and the coordinator countersigned 4"):
        opened(path).check_against(count, head)
    path.unlink()
    with pytest.raises(PrivacyRefusal, match="has 0 entries"):
        opened(path).check_against(count, head)
    opened(path).check_against(*opened(path).head())


def test_a_copy_that_went_on_by_itself_is_seen(tmp_path: Path) -> None:
    path, other = tmp_path / "l.jsonl", tmp_path / "other.jsonl"
    debited(opened(path), 2)
    shutil.copy(path, other)
    debited(opened(path), 1)
    debited(opened(other), 3, OTHER)
    opened(other).check_against(2, opened(path)._chain.links()[1].digest)
    with pytest.raises(PrivacyRefusal, match="entry 3 is not the entry"):
        opened(other).check_against(*opened(path).head())


def test_a_countersignature_stands_for_one_site_one_ledger_one_head_only() -> None:
    coordinator, other = Identity.generate(), Identity.generate()
    right = ("north", "ledger", 4, "ab" * 32)
    signature = countersign(coordinator, *right)
    check_countersigned(coordinator.public, *right, signature)
    for at, wrong in enumerate(("south", "other", 3, "ac" * 32)):
        with pytest.raises(ProtocolViolation):
            check_countersigned(coordinator.public, *right[:at], wrong, *right[at + 1 :], signature)
    flipped = bytes([signature[0] ^ 1]) + signature[1:]
    for key, signed in ((other, signature), (coordinator, countersign(other, *right)), (coordinator, flipped)):
        with pytest.raises(ProtocolViolation):
            check_countersigned(key.public, *right, signed)


def test_a_changed_byte_stops_everything(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    debited(opened(path), 2)
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        ledger = opened(path)
        for use in (ledger.spent, ledger.head, lambda one=ledger: one.check(EVENT), lambda one=ledger: debited(one, 1)):
            with pytest.raises(DataError):
                use()


def test_the_ledger_of_another_data_set_does_not_stand_in(tmp_path: Path) -> None:
    debited(opened(tmp_path / "l.jsonl", dataset="old"), 1)
    with pytest.raises(DataError, match="line=1"):
        opened(tmp_path / "l.jsonl", dataset="new").spent()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("refund", {"noise_multiplier": 1.1, "sample_rate": 0.05, "steps": 10}),
        ("spend", {"sample_rate": 0.05, "steps": 10}),
        ("spend", {"noise_multiplier": 1.1, "sample_rate": 0.05, "steps": -10}),
        ("spend", {"noise_multiplier": "big", "sample_rate": 0.05, "steps": 10}),
    ],
)
def test_an_entry_that_is_not_understood_is_not_passed_over(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    path = tmp_path / "l.jsonl"
    Chain(path, "offsite privacy ledger records").append(kind, fields, now=NOW)
    with pytest.raises(DataError, match="entry 1 is unknown to this release"):
        opened(path).check(EVENT)
