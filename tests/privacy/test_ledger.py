"""The privacy ledger: the recorded spending is never less than the releases, through kills, full disks and restores."""

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from offsite.privacy.ledger import Ledger, Standing
from offsite.trust.chain import Chain
from offsite.trust.countersign import check_countersigned, countersign
from offsite.trust.identity import Identity
from tests.power import Disk

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
EVENT, OTHER = Event(1.1, 0.05, 10), Event(0.8, 0.02, 7)
DELTA = 1e-5


@pytest.fixture(autouse=True)
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches the real accountant's sums, so that processes forked from this one need not compute them again."""
    real = ACCOUNTANTS["rdp"]
    sums: dict[tuple[float | Event, ...], float] = {}

    def account(events: Sequence[Event], delta: float) -> float:
        key = (delta, *compose(events))
        if key not in sums:
            sums[key] = real(events, delta)
        return sums[key]

    monkeypatch.setitem(ACCOUNTANTS, "rdp", account)


def opened(path: Path, *, cap: float = 8.0, dataset: str = "records", accountant: str = "rdp") -> Ledger:
    return Ledger(path, dataset=dataset, epsilon_cap=cap, delta=DELTA, accountant=accountant)


def reserved(ledger: Ledger, event: Event = EVENT, job: str = "job", *, times: int = 1, delta: float = DELTA) -> None:
    """Sets so many releases of a job aside, those that it has made already included."""
    whole = replace(event, steps=event.steps * times)
    ledger.reserve(whole, job=job, delta=delta, records=100, now=NOW)


def debited(ledger: Ledger, times: int, event: Event = EVENT, job: str = "job") -> None:
    """Sets releases of a job aside, and enters them: one entry of the ledger, and one for each release."""
    if times:
        reserved(ledger, event, job, times=ledger.releases(job) + times)
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
    assert ledger.standing() == Standing(0.0, 0.0, DELTA)
    for event, job in ((EVENT, "one"), (OTHER, "two"), (EVENT, "three")):
        debited(ledger, 1, event, job)
        assert opened(tmp_path / "l.jsonl").standing() == Standing(ledger.spent(), ledger.spent(), DELTA)
        assert ledger.spent() > 0


SPENT = {"job": "job", "round": 1, "noise_multiplier": 1.1, "sample_rate": 0.05, "steps": 10}


def entered(path: Path, **fields: Any) -> Ledger:
    """A ledger with one release of EVENT in it, as some release of offsite wrote it."""
    Chain(path, "offsite privacy ledger records").append("spend", SPENT | fields, now=NOW)
    return opened(path)


@pytest.mark.parametrize(
    ("fields", "recorded"),
    [
        ({"delta": DELTA, "epsilon_total": 1.25, "epsilon_committed": 2}, (1.25, 2.0)),
        ({"delta": DELTA / 2, "epsilon_total": 1.25, "epsilon_committed": 2}, None),
        ({"epsilon_total": 1.25, "epsilon_committed": 2}, None),
        ({"delta": DELTA, "epsilon_total": 1.25}, None),  # of a release that set nothing aside
    ],
)
def test_an_epsilon_recorded_at_another_delta_is_computed_again(
    tmp_path: Path, fields: dict[str, Any], recorded: tuple[float, float] | None
) -> None:
    computed = ACCOUNTANTS["rdp"]([EVENT], DELTA)
    assert entered(tmp_path / "l.jsonl", **fields).standing() == Standing(*(recorded or (computed, computed)), DELTA)


@pytest.mark.parametrize("total", [None, "1.25", True])
@pytest.mark.parametrize("name", ["epsilon_total", "epsilon_committed"])
def test_an_entry_without_its_epsilon_is_not_taken_for_none(tmp_path: Path, name: str, total: object) -> None:
    fields = {"delta": DELTA, "epsilon_total": 1.0, "epsilon_committed": 1.0} | {name: total}
    with pytest.raises(DataError, match="entry 1 is unknown to this release"):
        entered(tmp_path / "l.jsonl", **fields).standing()


def test_a_debit_says_what_stands_in_the_ledger(tmp_path: Path) -> None:
    ledger, total = opened(tmp_path / "l.jsonl"), 0.0
    assert (ledger.spent(), ledger.head()[0]) == (0.0, 0)
    reserved(ledger, times=4)
    for number in range(1, 5):
        projected = ledger.check(EVENT, job="job")
        spend = ledger.debit(EVENT, job="job", round=1, now=NOW)  # the same round again makes another entry
        assert (spend.number, spend.head) == ledger.head()
        assert (spend.number, spend.delta) == (1 + number, DELTA)
        assert spend.epsilon_total == projected == ledger.spent() == opened(tmp_path / "l.jsonl").spent()
        assert spend.epsilon_total == ACCOUNTANTS["rdp"]([EVENT] * number, DELTA)
        assert spend.epsilon_round == pytest.approx(spend.epsilon_total - total, abs=1e-12)
        total = spend.epsilon_total


def test_checking_enters_nothing(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "l.jsonl")
    reserved(ledger)
    ledger.check(EVENT, job="job")
    assert (ledger.spent(), ledger.head()[0], ledger.releases("job")) == (0.0, 1, 0)


def within(cap: float, event: Event = EVENT, delta: float = DELTA) -> int:
    """Returns by brute force how many releases stay within a cap."""
    return next(n for n in range(1, 1000) if ACCOUNTANTS["rdp"]([event] * (n + 1), delta) > cap)


def test_the_cap_is_met_and_never_passed(tmp_path: Path) -> None:
    """The ledger sets as many releases aside as brute force permits, and no more; a lower cap stops what is left."""
    permitted, path = within(2.5), tmp_path / "l.jsonl"
    ledger = opened(path, cap=2.5)
    assert permitted > 2
    with pytest.raises(PrivacyRefusal, match=r"epsilon=2\.5\d* with the whole job at delta=1e-05: the cap .* is 2\.5;"):
        reserved(ledger, times=permitted + 1)
    assert ledger.head()[0] == 0
    debited(ledger, permitted)
    before = path.read_bytes()
    for refused in (
        lambda: ledger.check(EVENT, job="job"),
        lambda: debited(ledger, 1),
        lambda: reserved(ledger, job="b"),
    ):
        with pytest.raises(PrivacyRefusal):
            refused()
    assert path.read_bytes() == before
    reserved(opened(path, cap=2.6), times=permitted + 1)
    for refused in (
        lambda: opened(path, cap=2.5).check(EVENT, job="job"),
        lambda: reserved(ledger, times=permitted + 1),
    ):
        with pytest.raises(PrivacyRefusal, match=r"the cap of data set 'records' is 2\.5"):
            refused()


# What is set aside


def test_a_job_that_the_cap_does_not_cover_whole_is_refused_before_its_first_release(tmp_path: Path) -> None:
    """Two jobs that fit one by one; together they do not, and the second learns so at its reserve."""
    ledger, half = opened(tmp_path / "l.jsonl", cap=2.5), within(2.5) // 2 + 1
    reserved(ledger, job="first", times=half)
    with pytest.raises(PrivacyRefusal, match="with the whole job"):
        reserved(ledger, job="second", times=half)
    with pytest.raises(PrivacyRefusal, match="no reserve of this job"):
        ledger.debit(EVENT, job="second", round=1, now=NOW)
    assert ledger.spent() == 0.0
    assert ledger.standing().committed == ACCOUNTANTS["rdp"]([EVENT] * half, DELTA)


def test_what_is_set_aside_is_what_may_be_spent(tmp_path: Path) -> None:
    """Committed epsilon is that of all steps of both jobs, however many of them have left."""
    ledger, whole = opened(tmp_path / "l.jsonl"), ACCOUNTANTS["rdp"]([EVENT] * 3 + [OTHER] * 2, DELTA)
    reserved(ledger, times=3)
    reserved(ledger, OTHER, "other", times=2)
    for event, job in ((EVENT, "job"), (OTHER, "other"), (EVENT, "job"), (EVENT, "job")):
        assert ledger.standing().committed == pytest.approx(whole)
        ledger.debit(event, job=job, round=1, now=NOW)
    with pytest.raises(PrivacyRefusal, match="no reserve of this job"):
        ledger.debit(EVENT, job="job", round=4, now=NOW)
    ledger.debit(OTHER, job="other", round=2, now=NOW)
    assert ledger.standing() == Standing(ledger.spent(), ledger.spent(), DELTA)
    assert ledger.spent() == pytest.approx(whole)


@pytest.mark.parametrize("other", [Event(1.2, 0.05, 10), Event(1.1, 0.06, 10), Event(1.1, 0.05, 11)])
def test_a_release_that_its_reserve_does_not_cover_is_refused(tmp_path: Path, other: Event) -> None:
    ledger = opened(tmp_path / "l.jsonl")
    reserved(ledger)
    for refused in (lambda: ledger.check(other, job="job"), lambda: ledger.debit(other, job="job", round=1, now=NOW)):
        with pytest.raises(PrivacyRefusal, match="no reserve of this job"):
            refused()
    assert ledger.head()[0] == 1


def test_a_closed_reserve_returns_what_was_not_spent_and_lets_nothing_follow(tmp_path: Path) -> None:
    """The rest is free for another job only because the first can never spend it."""
    ledger, most = opened(tmp_path / "l.jsonl", cap=2.5), within(2.5)
    reserved(ledger, job="first", times=most)
    ledger.debit(EVENT, job="first", round=1, now=NOW)
    with pytest.raises(PrivacyRefusal, match="with the whole job"):
        reserved(ledger, job="second")
    assert ledger.close("first", now=NOW)
    assert not ledger.close("first", now=NOW)
    assert ledger.reserved_jobs() == frozenset()
    with pytest.raises(PrivacyRefusal, match="no reserve of this job"):
        ledger.debit(EVENT, job="first", round=2, now=NOW)
    reserved(ledger, job="second", times=most - 1)
    assert ledger.standing().committed == ACCOUNTANTS["rdp"]([EVENT] * most, DELTA)
    with pytest.raises(PrivacyRefusal, match="with the whole job"):  # the first comes back, and there is no room
        reserved(ledger, job="first", times=2)


def test_a_reserve_is_made_once_and_of_the_rest_only(tmp_path: Path) -> None:
    """A restart sets nothing aside again; a job that comes back after its end sets aside what it has not spent."""
    path = tmp_path / "l.jsonl"
    for _ in range(3):
        reserved(opened(path), times=3)
    ledger = opened(path)
    ledger.debit(EVENT, job="job", round=1, now=NOW)
    reserved(ledger, times=3)
    assert ledger.head()[0] == 2
    ledger.close("job", now=NOW)
    reserved(ledger, times=3)
    assert ledger.standing().committed == ACCOUNTANTS["rdp"]([EVENT] * 3, DELTA)
    debited(ledger, 2)
    before = ledger.head()
    reserved(ledger, times=3)
    assert ledger.head() == before


@pytest.mark.parametrize("spends", [0, 1])
def test_a_job_keeps_the_numbers_of_its_reserve(tmp_path: Path, spends: int) -> None:
    """Another declared number of records gives other noise: this is another job, or a mistake."""
    ledger = opened(tmp_path / "l.jsonl")
    reserved(ledger, times=2)
    for _ in range(spends):
        ledger.debit(EVENT, job="job", round=1, now=NOW)
        ledger.close("job", now=NOW)
    with pytest.raises(PrivacyRefusal, match="the ledger has this job with other numbers"):
        reserved(ledger, Event(1.1, 0.04, 10), times=2)


def test_the_cap_holds_at_the_delta_that_the_jobs_claim(tmp_path: Path) -> None:
    """A cap counted at a delta of 1e-3 would let 7.65 jobs of epsilon 8 through; at the jobs' own delta, one."""
    job = Event(0.9, 0.01, 100)
    claimed = ACCOUNTANTS["rdp"]([job], 1e-6)
    assert ACCOUNTANTS["rdp"]([job] * 3, 1e-3) < claimed  # three jobs fit under the cap at the larger delta
    ledger = Ledger(tmp_path / "l.jsonl", dataset="records", epsilon_cap=claimed, delta=1e-3, accountant="rdp")
    reserved(ledger, job, "first", delta=1e-6)
    assert ledger.standing() == Standing(0.0, claimed, 1e-6)
    with pytest.raises(PrivacyRefusal, match=r"at delta=1e-06: the cap"):
        reserved(ledger, job, "second", delta=1e-6)
    with pytest.raises(PrivacyRefusal, match=r"at delta=1e-06: the cap"):  # nor by naming a larger delta later
        reserved(ledger, job, "second", delta=1e-3)


def test_a_release_without_noise_worth_the_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyRefusal, match="below the floor"):
        reserved(opened(tmp_path / "l.jsonl", cap=1e9), Event(0.1, 0.01, 1))
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
    reserved(opened(path), event, times=301)
    chain = Chain(path, "offsite privacy ledger records")
    for _ in range(300):
        chain.append("spend", SPENT | {"noise_multiplier": 4.0, "sample_rate": 0.01, "steps": 5}, now=NOW)
    ledger, began = opened(path, accountant="pld"), os.times().user
    assert ledger.check(event, job="job") == ledger.debit(event, job="job", round=301, now=NOW).epsilon_total
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
    reserved(opened(start), times=already + 2)
    for number in range(already):
        opened(start).debit(EVENT, job="job", round=number + 1, now=NOW)
    account, entered, at = ACCOUNTANTS["rdp"], set(), 0
    while True:
        at += 1
        path, outbox = tmp_path / "l.jsonl", tmp_path / "outbox"
        shutil.copy(start, path)
        outbox.write_bytes(b"x" * already)

        def work(path: Path = path, outbox: Path = outbox) -> None:
            ledger = opened(path)
            ledger.check(EVENT, job="job")
            ledger.debit(EVENT, job="job", round=9, now=NOW)
            with outbox.open("ab") as file:
                file.write(b"x")
            ledger.spent()

        code = killed_at(at, work)
        ledger, released = opened(path), len(outbox.read_bytes())
        assert ledger.spent() >= account([EVENT] * released, DELTA)
        assert ledger.releases("job") in (released, released + 1)
        entered.add((ledger.releases("job") - already, released - already))
        ledger.debit(EVENT, job="job", round=10, now=NOW)
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
    assert opened(path).releases("job") == 2


def test_a_full_disk_releases_nothing(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    reserved(opened(path), times=2)
    opened(path).debit(EVENT, job="job", round=1, now=NOW)
    size, before = path.stat().st_size, path.read_bytes()

    def work() -> None:
        for room in (0, 1, 100):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, resource.RLIM_INFINITY))
            for act in (
                lambda: opened(path).debit(EVENT, job="job", round=2, now=NOW),
                lambda: reserved(opened(path), job="other"),
                lambda: opened(path).close("job", now=NOW),
            ):
                with pytest.raises(DataError, match="free disk space"):
                    act()

    assert ended(forked(work)) == 0
    assert path.read_bytes() == before
    assert opened(path).head()[0] == 2


# Several at once


def test_two_programs_on_one_ledger_do_not_pass_the_cap_together(tmp_path: Path) -> None:
    """Each sees room for its job; only one of them gets the last room."""
    permitted = within(2.5)

    def work(program: int) -> None:
        ledger, number = opened(tmp_path / "l.jsonl", cap=2.5), 0
        while number < 100:
            try:
                debited(ledger, 1, job=f"{program}.{number}")
            except PrivacyRefusal:
                return
            number += 1
        raise AssertionError("the cap has not stopped this program")

    pids = [forked(lambda program=program: work(program)) for program in range(3)]  # type: ignore[misc]
    assert [ended(pid) for pid in pids] == [0] * 3
    ledger = opened(tmp_path / "l.jsonl")
    assert ledger.head()[0] == 2 * permitted
    assert ledger.standing().committed <= 2.5


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
        debited(opened(path), newer, job="newer")
        opened(path).check_against(count, head)
    shutil.copy(old, path)
    with pytest.raises(PrivacyRefusal, match="has 3 entries, and the coordinator countersigned 6"):
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
    debited(opened(other), 3, OTHER, "other")
    opened(other).check_against(3, opened(path)._chain.links()[2].digest)
    with pytest.raises(PrivacyRefusal, match="entry 5 is not the entry"):
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
        for use in (
            ledger.spent,
            ledger.head,
            lambda one=ledger: one.check(EVENT, job="job"),
            lambda one=ledger: reserved(one),
        ):
            with pytest.raises(DataError):
                use()


def test_the_ledger_of_another_data_set_does_not_stand_in(tmp_path: Path) -> None:
    debited(opened(tmp_path / "l.jsonl", dataset="old"), 1)
    with pytest.raises(DataError, match="line=1"):
        opened(tmp_path / "l.jsonl", dataset="new").spent()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("refund", {}),
        ("spend", {"noise_multiplier": None}),
        ("spend", {"steps": -10}),
        ("spend", {"noise_multiplier": "big"}),
        ("spend", {"job": 7}),
        ("reserve", {}),
        ("reserve", {"job_delta": 0.0}),
        ("reserve", {"job_delta": "small"}),
        ("reserve", {"job_delta": 1e-6, "steps": 0}),
        ("close", {"job": None}),
    ],
)
def test_an_entry_that_is_not_understood_is_not_passed_over(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    path = tmp_path / "l.jsonl"
    Chain(path, "offsite privacy ledger records").append(kind, SPENT | fields, now=NOW)
    with pytest.raises(DataError, match="entry 1 is unknown to this release"):
        opened(path).check(EVENT, job="job")


@pytest.mark.parametrize("times", [1, 2])
def test_a_debit_is_there_after_a_cut_of_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    (tmp_path / "state").mkdir()
    disk = Disk(tmp_path / "state", monkeypatch)
    debited(opened(tmp_path / "state" / "ledger.jsonl"), times)
    after = disk.after_power_cut(tmp_path / "after")
    assert opened(after / "ledger.jsonl").releases("job") == times
