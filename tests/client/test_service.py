"""A running site's answers, without a network: whose word it takes, when it trains, and what it tries again."""

import dataclasses
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from client.site import Site
from errors import DataError, DigestMismatch, UnsupportedModel
from protos import codec
from protos.manifest import JobManifest
from tests.memory_federation import NOW, RunningSite, World, make_world


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(fed, tmp_path_factory.mktemp("service"))


def offered(site: RunningSite, state: str = "ready") -> codec.OfferReply:
    """Offers until the site is in a state."""
    for _ in range(3000):
        reply = site.ask("offer", site.world.offer(site.name))
        assert isinstance(reply, codec.OfferReply), reply
        if reply.state == state:
            return reply
        if site.service._preparation is not None:
            site.service._preparation.wait(0.05)
    raise AssertionError(reply)


def train(site: RunningSite) -> codec.Message:
    world = site.world
    return site.ask("train", codec.TrainRequest(world.manifest.digest(), 1, world.start))


def notes(site: RunningSite) -> list[str]:
    return [json.loads(line)["kind"] for line in (site.folder / "audit.jsonl").read_text().splitlines()]


def test_nothing_is_trained_before_its_owner_has_approved(world: World, tmp_path: Path) -> None:
    """Fetched and opened meanwhile, so that a dry run is possible; the approval counts at once, and so does its end."""
    site = RunningSite(world, "ash", tmp_path / "ash", policy={"approval": "manual"})
    digest = world.manifest.digest().hex()
    reply = offered(site, "waiting")
    assert f"has not approved job {digest[:12]}" in reply.detail
    assert site.service._preparation is not None
    site.service._preparation.wait(30)
    assert (tmp_path / "ash" / "packages" / world.manifest.emulator).is_dir()
    assert offered(site, "waiting").fetched == world.delivery.size
    refusal = train(site)
    assert isinstance(refusal, codec.Refusal)
    assert refusal.kind == "PolicyRefusal"
    site.jobs.approve(digest[:12], by="owner", at="now")
    offered(site)
    assert isinstance(train(site), codec.TrainReply)
    (tmp_path / "ash" / "jobs" / digest / "approved.json").unlink()
    assert isinstance(train(site), codec.Refusal)
    assert offered(site, "waiting")


def test_its_owner_is_told_how_a_job_stands(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each change once, however often the coordinator asks; words that are not ours stand in quotes."""
    caplog.set_level("INFO", "offsite.client")
    digest = world.manifest.digest().hex()
    site = RunningSite(world, "ash", tmp_path / "ash", policy={"approval": "manual"})
    offered(site, "waiting")
    assert site.service._preparation is not None
    site.service._preparation.wait(30)
    for _ in range(3):
        offered(site, "waiting")
    site.jobs.approve(digest[:12], by="owner", at="now")
    offered(site)
    for _ in range(2):
        train(site)
        offered(site)
    site.ask("abort", codec.Notice("abort", "\x1b[2J"))
    assert caplog.messages == [
        f"job waiting: the data owner has not approved job {digest[:12]} yet",
        "job ready",
        "round 1: trained",
        "the coordinator gave the round up: '\\x1b[2J'",
    ]


def test_its_owner_is_told_of_a_refusal(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "offsite.client")
    site = RunningSite(world, "ash", tmp_path / "ash", policy={"max_rank": 1})
    for _ in range(2):
        site.ask("offer", world.offer("ash"))
    (line,) = caplog.messages
    assert line.startswith("job refused: PolicyRefusal: ")
    assert line.endswith("; after a change here, start offsite client run again")


def test_an_epoch_that_has_ended_takes_no_job(world: World, tmp_path: Path) -> None:
    """A site may have run since before its end."""
    site = RunningSite(world, "ash", tmp_path / "ash")
    later = dataclasses.replace(site.service._standing, clock=lambda: NOW + timedelta(days=400))
    site.service._standing = later
    reply = site.ask("offer", world.offer("ash"))
    assert isinstance(reply, codec.Refusal)
    assert reply.kind == "Untrusted"
    assert not site.opened


def failing(error: Exception, times: int) -> Callable[[RunningSite], Callable[[JobManifest, Path], Site]]:
    """Lets a site fail to open a job, so many times."""
    left = [times]

    def wrap(site: RunningSite) -> Callable[[JobManifest, Path], Site]:
        honest = site._open

        def open_site(manifest: JobManifest, package: Path) -> Site:
            site.opened.append(manifest)
            if left[0]:
                left[0] -= 1
                raise error
            return honest(manifest, package)

        return open_site

    return wrap


def with_opening(site: RunningSite, wrap: Callable[[RunningSite], Any]) -> RunningSite:
    import dataclasses

    standing = site.service._standing
    means = dataclasses.replace(standing.means, open_site=wrap(site))
    site.service._standing = dataclasses.replace(standing, means=means)
    return site


def test_what_may_pass_is_tried_again(world: World, tmp_path: Path) -> None:
    site = with_opening(RunningSite(world, "ash", tmp_path / "ash"), failing(DataError("disk is full"), 2))
    for _ in range(2):
        assert offered(site, "refused").detail == "DataError: disk is full"
    offered(site)


@pytest.mark.parametrize("error", [UnsupportedModel("a trap"), DigestMismatch("another")])
def test_what_cannot_pass_is_not(world: World, tmp_path: Path, error: Exception) -> None:
    """A refused emulator is not vetted again with every offer; one that may be damaged is gone from the disk."""
    site = with_opening(RunningSite(world, "ash", tmp_path / "ash"), failing(error, 1))
    first = offered(site, "refused")
    for _ in range(5):
        assert offered(site, "refused").detail == first.detail
    assert len(site.opened) == 1
    kept = (tmp_path / "ash" / "packages" / world.manifest.emulator).is_dir()
    assert kept == isinstance(error, UnsupportedModel)


def test_the_same_question_gets_the_same_bytes_until_it_trains_again(world: World, tmp_path: Path) -> None:
    site = RunningSite(world, "ash", tmp_path / "ash", package=world.run.store.package)
    site.ready()
    assert isinstance(train(site), codec.TrainReply)
    from protos.terms import adapter_digest

    opening = codec.encode(codec.KeysRequest(1, 1, bytes(32), adapter_digest(world.start), world.sites))
    first = site.service.handle("keys", opening)
    assert isinstance(codec.decode(first), codec.SignedBatch)
    assert site.service.handle("keys", opening) == first
    assert isinstance(train(site), codec.TrainReply)  # the update that waits is not trained twice
    again = codec.decode(site.service.handle("keys", opening))
    assert isinstance(again, codec.Refusal)  # the round was claimed, and its keys are gone with the question
    assert "not newer" in again.reason


def test_a_fault_in_the_program_is_told_without_its_words(world: World, tmp_path: Path) -> None:
    site = RunningSite(world, "ash", tmp_path / "ash", package=world.run.store.package)
    site.ready()
    assert site.service._preparation is not None

    class Broken:
        def train(self, request: codec.TrainRequest) -> codec.Message:
            raise RuntimeError("w1 w2 w3: a record")

    from client import site as module

    original = module.STAGES["train"]
    module.STAGES["train"] = lambda _, request: Broken().train(request)  # type: ignore[arg-type]
    try:
        refusal = train(site)
    finally:
        module.STAGES["train"] = original
    assert isinstance(refusal, codec.Refusal)
    assert refusal.kind == "Fault"
    assert "w1" not in refusal.reason
    assert "w1" not in (tmp_path / "ash" / "audit.jsonl").read_text()


def test_a_ledger_that_fell_behind_is_told_before_anything_is_fetched(world: World, tmp_path: Path) -> None:
    from client.books import ledger_name
    from trust.countersign import countersign

    site = RunningSite(world, "ash", tmp_path / "ash")
    name, head = ledger_name("main"), "ab" * 32
    signature = countersign(world.coordinator, "ash", name, 3, head)
    offer = world.offer("ash", ledgers=(codec.LedgerHead(name, 3, head, signature),))
    refusal = site.ask("offer", offer)
    assert isinstance(refusal, codec.Refusal)
    assert "an old copy was restored" in refusal.reason
    forged = world.offer("ash", ledgers=(codec.LedgerHead(name, 3, head, bytes(64)),))
    assert isinstance(site.ask("offer", forged), codec.Refusal)
    other = world.offer("ash", ledgers=(codec.LedgerHead(ledger_name("other"), 3, head, bytes(64)),))
    assert isinstance(site.ask("offer", other), codec.OfferReply)  # of another data set: not this ledger's business


def test_the_end_of_a_job_is_an_end(world: World, tmp_path: Path) -> None:
    site = RunningSite(world, "ash", tmp_path / "ash", package=world.run.store.package)
    site.ready()
    site.ask("finish", codec.Notice("finish", "all rounds are done"))
    refusal = train(site)
    assert isinstance(refusal, codec.Refusal)
    assert "no job is ready at this site" in refusal.reason
    assert "finished" in notes(site)
