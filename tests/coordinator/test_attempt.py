"""An attempt at a round, killed in every stage, resumes with the same masks, asks nothing twice and counts once."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from offsite.client.site.round_handler import answer
from offsite.coordinator.network.signed_exchange import SignedExchange
from offsite.coordinator.rounds.attempt import MASKED_UPLOAD_STAGE, Attempt, Attempts
from offsite.coordinator.rounds.counter import MonotonicCounter
from offsite.coordinator.rounds.exchange import MAX_REASON_LENGTH, MemoryExchange
from offsite.coordinator.rounds.round import RoundPlan, RoundResult, run_round, send_abort
from offsite.errors import DataError, TooFewSurvivors
from offsite.protos import codec
from offsite.secagg import signed_bodies
from offsite.secagg.member import Member
from tests.memory_federation import RunningSite, World, letters_to, make_world, open_sites

STAGES = ("train", "keys", "shares", "masked", "survivors", "unmask")
SITES = ("ash", "birch", "cedar")
MOMENTS = ("before", "among", "after")


class Killed(Exception):
    """Stands for the end of the coordinator's process."""


class Asked:
    """An exchange that keeps its questions, and dies on command.

    Args:
      inner: function that carries the stages.
      stage: stage in which the exchange dies.
      moment: moment of the kill: `before` any site is asked, `among` the sites after the first question, or `after` the
        last question, whose answer is then lost.
    """

    def __init__(
        self, inner: Callable[[str, Mapping[str, bytes]], dict[str, bytes]], stage: str = "", moment: str = ""
    ):
        self.inner, self.stage, self.moment = inner, stage, moment
        self.stages: list[str] = []

    def send(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        self.stages.append(stage)
        if stage != self.stage:
            return self.inner(stage, payloads)
        if self.moment == "among":
            self.inner(stage, dict(list(payloads.items())[:1]))
        elif self.moment == "after":
            self.inner(stage, payloads)
        raise Killed


def echo(stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
    return {site: stage.encode() + body for site, body in payloads.items()}


def attempts(folder: Path, nonce: bytes = b"\1" * 32) -> Attempts:
    """Returns the attempts of a run, as a fresh process opens them."""
    folder.mkdir(exist_ok=True)
    return Attempts(folder, lambda: nonce, MonotonicCounter(folder / "aggregations.txt", lambda: 1000))


def everyone() -> tuple[str, ...]:
    return SITES


def nobody() -> tuple[str, ...]:
    raise AssertionError("the cohort of an attempt that goes on was asked for")


def question(stage: str) -> dict[str, bytes]:
    return {site: f"{stage} to {site}".encode() for site in SITES}


def run_stages(attempt: Attempt, until: str = "") -> dict[str, dict[str, bytes]]:
    return {stage: attempt.send(stage, question(stage)) for stage in STAGES[: STAGES.index(until) if until else None]}


# the record of an attempt by itself


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_second_try_asks_only_for_what_is_missing(tmp_path: Path, stage: str, moment: str) -> None:
    first = Asked(echo, stage, moment)
    plan = (opened := attempts(tmp_path).open(1, everyone, first)).plan
    with pytest.raises(Killed):
        run_stages(opened)
    second = Asked(echo)
    attempt = attempts(tmp_path, b"\2" * 32).open(1, nobody, second)
    assert attempt.plan == plan == RoundPlan(1, 1000, b"\1" * 32, SITES, plan.secret)
    assert attempt.resumed
    assert not opened.resumed
    assert run_stages(attempt) == {one: echo(one, question(one)) for one in STAGES}
    assert first.stages == list(STAGES[: STAGES.index(stage) + 1])
    assert second.stages == list(STAGES[STAGES.index(stage) :])
    assert attempts(tmp_path).count.spent == 1


def test_killed_over_and_over_it_is_counted_once_and_each_stage_is_whole_once(tmp_path: Path) -> None:
    for before, stage in zip((None, *STAGES), STAGES, strict=False):
        for moment in MOMENTS:
            exchange = Asked(echo, stage, moment)
            with pytest.raises(Killed):
                run_stages(attempts(tmp_path).open(1, everyone, exchange))
            # the stage before became whole only now, since each kill lost its answers
            assert exchange.stages == ([before, stage] if before and moment == MOMENTS[0] else [stage])
            assert attempts(tmp_path).count.spent == (STAGES.index(stage) >= STAGES.index(MASKED_UPLOAD_STAGE))
    last = Asked(echo)
    run_stages(attempts(tmp_path).open(1, nobody, last))
    assert last.stages == ["unmask"]


def test_a_finished_attempt_that_was_not_stored_asks_nobody(tmp_path: Path) -> None:
    said = run_stages(attempts(tmp_path).open(1, everyone, Asked(echo)))
    silent = Asked(echo)
    assert run_stages(attempts(tmp_path).open(1, nobody, silent)) == said
    assert silent.stages == []


def test_it_is_counted_before_an_update_can_leave(tmp_path: Path) -> None:
    seen = []

    def look(stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        seen.append((stage, attempts(tmp_path).count.spent))
        return echo(stage, payloads)

    run_stages(attempts(tmp_path).open(1, everyone, Asked(look)))
    assert seen == [(stage, int(place >= STAGES.index(MASKED_UPLOAD_STAGE))) for place, stage in enumerate(STAGES)]


def test_answers_of_sites_that_were_silent_are_not_asked_for_again(tmp_path: Path) -> None:
    """A stage is whole with the answers that came, also when a site is missing; empty and missing answers differ."""
    replies = {"birch": b"", "ash": bytes(range(256)) * 300}
    attempt = attempts(tmp_path).open(1, everyone, Asked(lambda stage, payloads: replies))
    assert attempt.send("train", question("train")) == replies
    assert attempts(tmp_path).open(1, nobody, Asked(echo)).send("train", question("train")) == replies
    empty = attempts(tmp_path).open(1, nobody, Asked(lambda stage, payloads: {}))
    assert empty.send("keys", question("keys")) == {}
    assert attempts(tmp_path).open(1, nobody, Asked(echo)).send("keys", question("keys")) == {}


CHANGES: dict[str, Callable[[dict[str, bytes]], object]] = {
    "body": lambda payloads: payloads.update(ash=payloads["ash"] + b"x"),
    "swapped": lambda payloads: payloads.update(ash=payloads["birch"], birch=payloads["ash"]),
    "one less": lambda payloads: payloads.pop("ash"),
    "one more": lambda payloads: payloads.update(elm=b"keys to elm"),
    "renamed": lambda payloads: payloads.update(elm=payloads.pop("ash")),
    "empty": lambda payloads: payloads.clear(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_answers_to_another_question_are_refused(tmp_path: Path, change: Callable[[dict[str, bytes]], object]) -> None:
    """The stage is the same and the payload differs; old answers would mix two computations."""
    run_stages(attempts(tmp_path).open(1, everyone, Asked(echo)), until="shares")
    exchange, payloads = Asked(echo), question("keys")
    change(payloads)
    attempt = attempts(tmp_path).open(1, nobody, exchange)
    with pytest.raises(DataError, match=r"keys\.replies: not the answers of this round.*remove"):
        attempt.send("keys", payloads)
    assert exchange.stages == []
    assert attempt.send("keys", question("keys")) == echo("keys", question("keys"))


def test_answers_under_the_name_of_another_stage_are_refused(tmp_path: Path) -> None:
    attempt = attempts(tmp_path).open(1, everyone, Asked(echo))
    attempt.send("train", payloads := {"ash": b"same bytes"})
    (tmp_path / "attempt" / "train.replies").rename(tmp_path / "attempt" / "keys.replies")
    with pytest.raises(DataError, match=r"keys\.replies"):
        attempt.send("keys", payloads)


def test_a_closed_attempt_is_gone_and_the_next_one_is_new(tmp_path: Path) -> None:
    first = attempts(tmp_path)
    old = first.open(1, everyone, Asked(echo))
    run_stages(old)
    first.close()
    first.close()
    assert not (tmp_path / "attempt").exists()
    exchange = Asked(echo)
    new = attempts(tmp_path, b"\2" * 32).open(1, lambda: SITES[:2], exchange)
    assert not new.resumed
    assert new.plan == RoundPlan(1, 1001, b"\2" * 32, SITES[:2], new.plan.secret)
    run_stages(new)
    assert exchange.stages == list(STAGES)
    assert first.count.spent == 2


def test_an_attempt_at_another_round_is_not_gone_on_with(tmp_path: Path) -> None:
    run_stages(attempts(tmp_path).open(1, everyone, Asked(echo)))
    exchange = Asked(echo)
    attempt = attempts(tmp_path).open(2, everyone, exchange)
    assert not attempt.resumed
    assert attempt.plan.sequence == 1001
    run_stages(attempt)
    assert exchange.stages == list(STAGES)


@pytest.mark.parametrize("left", [(), ("plan.json.partial",)])
def test_killed_before_the_plan_was_on_disk_it_starts_afresh(tmp_path: Path, left: tuple[str, ...]) -> None:
    (tmp_path / "attempt").mkdir()
    for name in left:
        (tmp_path / "attempt" / name).write_bytes(b'{"num')
    assert not attempts(tmp_path).open(1, everyone, Asked(echo)).resumed
    assert sorted(path.name for path in (tmp_path / "attempt").iterdir()) == ["plan.json"]


def test_killed_while_an_attempt_is_forgotten_it_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan without its answers would ask the sites again, in stages that the sites have already left."""
    first = attempts(tmp_path)
    run_stages(first.open(1, everyone, Asked(echo)))

    def killed(folder: Path) -> None:
        (folder / "train.replies").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            first.close()
    exchange = Asked(echo)
    attempt = attempts(tmp_path, b"\2" * 32).open(1, everyone, exchange)
    assert (attempt.resumed, attempt.plan.sequence) == (False, 1001)
    run_stages(attempt)
    assert exchange.stages == list(STAGES)


def test_half_written_answers_of_a_kill_are_asked_for_again(tmp_path: Path) -> None:
    run_stages(attempts(tmp_path).open(1, everyone, Asked(echo)), until="keys")
    (tmp_path / "attempt" / "keys.replies.partial").write_bytes(b"\0\0")
    exchange = Asked(echo)
    run_stages(attempts(tmp_path).open(1, nobody, exchange))
    assert exchange.stages == list(STAGES[1:])


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_where_an_attempt_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = attempts(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        with pytest.raises(DataError, match=r"^folder=.*No space left on device.*free disk space"):
            run.open(1, everyone, Asked(echo))
    assert run_stages(run.open(1, everyone, Asked(echo))).keys() == set(STAGES)


def test_a_full_disk_is_said_where_an_attempt_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark is a file like the others: the mark is on disk before an update leaves, or the round ends."""
    exchange = Asked(echo)
    attempt = attempts(tmp_path).open(1, everyone, exchange)
    run_stages(attempt, MASKED_UPLOAD_STAGE)
    mark, fsync = tmp_path / "attempt" / "spent", os.fsync

    def fails(descriptor: int) -> None:
        if ".spent." in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            full()
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(DataError, match=r"spent.*No space left on device"):
            attempt.send(MASKED_UPLOAD_STAGE, question(MASKED_UPLOAD_STAGE))
    assert not mark.exists()
    assert MASKED_UPLOAD_STAGE not in exchange.stages
    attempt.send(MASKED_UPLOAD_STAGE, question(MASKED_UPLOAD_STAGE))
    assert mark.exists()


def test_answers_that_cannot_be_kept_end_the_round(tmp_path: Path) -> None:
    """Without the answers on disk, a resumed round would ask sites in a stage that the sites have already left."""
    attempt = attempts(tmp_path).open(1, everyone, Asked(echo))
    (tmp_path / "attempt" / f".train.replies.{os.getpid()}.partial").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        attempt.send("train", question("train"))


# damaged files


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"spent": 1, "x": 2}', '{"lost": 1}', "\x00"])
def test_a_damaged_count_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "attempts.json").write_text(content)
    with pytest.raises(DataError, match=r"attempts\.json is damaged"):
        _ = attempts(tmp_path).count
    attempt = attempts(tmp_path).open(1, everyone, Asked(echo))
    with pytest.raises(DataError, match=r"attempts\.json is damaged"):
        attempt.send(MASKED_UPLOAD_STAGE, question(MASKED_UPLOAD_STAGE))


def stored(folder: Path) -> tuple[Path, bytes]:
    attempts(folder).open(1, everyone, Asked(echo)).send("keys", question("keys"))
    path = folder / "attempt" / "keys.replies"
    return path, path.read_bytes()


def test_every_changed_or_missing_byte_of_the_answers_is_named(tmp_path: Path) -> None:
    path, content = stored(tmp_path)
    attempt = attempts(tmp_path).open(1, nobody, Asked(echo))
    for place in range(len(content)):
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        for damaged in (content[:place], flipped, content + b"\0"):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=r"keys\.replies"):
                attempt.send("keys", question("keys"))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"number": 1}', '{"number": 1, "sequence": 1, "nonce": "x"}']
)
def test_a_damaged_plan_is_named(tmp_path: Path, content: str) -> None:
    attempts(tmp_path).open(1, everyone, Asked(echo))
    (tmp_path / "attempt" / "plan.json").write_text(content)
    with pytest.raises(DataError, match=r"plan\.json"):
        attempts(tmp_path).open(1, nobody, Asked(echo))


# whole rounds with real sites, their ledgers, and signed messages


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(fed, tmp_path_factory.mktemp("attempt"))


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Returns the update of a round without signed messages, attempts and kills."""
    sites = open_sites(world, tmp_path_factory.mktemp("undisturbed"))
    handlers = {
        name: lambda stage, body, s=site.service._loader.site: answer(s, stage, body)  # type: ignore[union-attr]
        for name, site in sites.items()
    }
    plan = RoundPlan(1, 1, bytes(32), world.sites)
    return run_round(world.manifest, plan, world.start, MemoryExchange(handlers)).update


class Coordinator:
    """The coordinator of one job; `open` does what a fresh process does."""

    def __init__(self, world: World, folder: Path, sites: dict[str, RunningSite]) -> None:
        self.world, self.folder, self.sites = world, folder, sites
        self.bad: list[tuple[str, str]] = []
        self.opened = 0

    def open(self, stage: str = "", moment: str = "") -> tuple[Attempt, Asked]:
        self.opened += 1
        signed = SignedExchange(
            letters_to(self.sites),
            self.world.coordinator,
            self.world.federation,
            MonotonicCounter(self.folder / "letters.txt"),
            lambda site, why: self.bad.append((site, why)),
        )
        asked = Asked(signed.send, stage, moment)
        opened = attempts(self.folder, bytes([self.opened]) * 32)
        return opened.open(1, lambda: self.world.sites, asked), asked

    def run(self, attempt: Attempt) -> RoundResult:
        return run_round(self.world.manifest, attempt.plan, self.world.start, attempt)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_round_killed_anywhere_ends_with_the_same_update(
    world: World, undisturbed: np.ndarray, tmp_path: Path, stage: str, moment: str
) -> None:
    sites = open_sites(world, tmp_path / "sites")
    coordinator = Coordinator(world, tmp_path / "run", sites)
    attempt, _ = coordinator.open(stage, moment)
    with pytest.raises(Killed):
        coordinator.run(attempt)
    again, asked = coordinator.open()
    assert again.plan == attempt.plan
    result = coordinator.run(again)
    assert result.members == world.sites
    assert result.refused == ()
    assert np.array_equal(result.update, undisturbed)
    assert asked.stages == list(STAGES[STAGES.index(stage) :])
    assert coordinator.bad == []
    assert attempts(tmp_path / "run").count.spent == 1
    for site in sites.values():
        assert site.ledger.releases(world.manifest.digest().hex()) == 1
        kinds = [json.loads(line)["kind"] for line in (site.folder / "audit.jsonl").read_text().splitlines()]
        assert kinds.count("egress") == 1
        assert len((site.folder / "rounds.jsonl").read_text().splitlines()) == 1


def test_killed_in_every_stage_and_then_once_more_from_disk(
    world: World, undisturbed: np.ndarray, tmp_path: Path
) -> None:
    sites = open_sites(world, tmp_path / "sites")
    coordinator = Coordinator(world, tmp_path / "run", sites)
    for stage in STAGES:
        for moment in MOMENTS:
            with pytest.raises(Killed):
                coordinator.run(coordinator.open(stage, moment)[0])
    assert np.array_equal(coordinator.run(coordinator.open()[0]).update, undisturbed)
    attempt, asked = coordinator.open()
    assert np.array_equal(coordinator.run(attempt).update, undisturbed)
    assert asked.stages == []
    assert [site.ledger.releases(world.manifest.digest().hex()) for site in sites.values()] == [1] * len(sites)


@pytest.mark.parametrize(("stage", "releases"), [("keys", 1), ("masked", 1), ("survivors", 2), ("unmask", 2)])
def test_an_attempt_that_cannot_go_on_is_tried_with_other_masks(
    world: World, undisturbed: np.ndarray, tmp_path: Path, stage: str, releases: int
) -> None:
    """Too few sites answer one stage, and the round is tried afresh.

    An update that had left its site is trained again with other noise and debited again. Any other update is used
    again. In the second attempt one more site has come back.
    """
    sites = open_sites(world, tmp_path / "sites")
    coordinator = Coordinator(world, tmp_path / "run", sites)
    attempt, asked = coordinator.open()
    carried = asked.inner
    asked.inner = lambda name, payloads: {} if name == stage else carried(name, payloads)
    with pytest.raises(TooFewSurvivors):
        coordinator.run(attempt)
    attempts(tmp_path / "run").close()
    again, asked = coordinator.open()
    send_abort(asked, world.sites, "too few")
    assert (again.plan.sequence, again.plan.nonce) != (attempt.plan.sequence, attempt.plan.nonce)
    result = coordinator.run(again)
    assert result.members == world.sites
    assert np.array_equal(result.update, undisturbed) == (releases == 1)
    job = world.manifest.digest().hex()
    assert [site.ledger.releases(job) for site in sites.values()] == [releases] * len(sites)


def test_a_changed_adapter_does_not_go_on_with_old_answers(world: World, tmp_path: Path) -> None:
    sites = open_sites(world, tmp_path / "sites")
    coordinator = Coordinator(world, tmp_path / "run", sites)
    attempt, _ = coordinator.open("shares", "before")
    with pytest.raises(Killed):
        coordinator.run(attempt)
    again, asked = coordinator.open()
    other = world.start + np.float32(0.5)
    with pytest.raises(DataError, match=r"train\.replies: not the answers of this round"):
        run_round(world.manifest, again.plan, other, again)
    assert asked.stages == []


def test_a_site_whose_share_does_not_fit_is_named(
    world: World, undisturbed: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site's update is in the sum, which the other sites' shares open; the round's record names the site."""
    original = Member.unmask

    def wrong(member: Member, signatures: list[signed_bodies.Signed]) -> signed_bodies.Signed:
        message = original(member, signatures)
        if message.sender != "ash":  # one of the first three sites, whose shares are tried first
            return message
        released = signed_bodies.read_released(message.body)
        body = signed_bodies.write_released({peer: (kind, share + 1) for peer, (kind, share) in released.items()})
        return member._sign(signed_bodies.UNMASK, body)

    monkeypatch.setattr(Member, "unmask", wrong)
    sites = open_sites(world, tmp_path / "sites")
    coordinator = Coordinator(world, tmp_path / "run", sites)
    result = coordinator.run(coordinator.open()[0])
    assert (result.members, result.refused, result.faulty) == (world.sites, (), ("ash",))
    assert np.array_equal(result.update, undisturbed)


def test_a_refusal_is_cut_before_it_is_recorded_and_told(world: World, tmp_path: Path) -> None:
    sites = open_sites(world, tmp_path / "sites")
    for site in list(sites.values())[:2]:
        site.service.handle = lambda stage, body: codec.encode(codec.Refusal("x" * 10**6, "\x1b[2J" * 10**5))  # type: ignore[method-assign]
        site.endpoint._handle = site.service.handle
    coordinator = Coordinator(world, tmp_path / "run", sites)
    with pytest.raises(TooFewSurvivors) as caught:
        coordinator.run(coordinator.open()[0])
    assert len(str(caught.value)) < 2 * MAX_REASON_LENGTH
    assert str(caught.value).isprintable()
