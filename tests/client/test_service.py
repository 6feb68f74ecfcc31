"""A running site's answers, without a network: its trust, its trainings and its second tries."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from offsite.client.home.redact import REFUSALS
from offsite.client.site.release_log import Release
from offsite.client.training.privacy_plan import plan_for
from offsite.emulator.package.package_reader import read_manifest
from offsite.errors import DataError, DigestMismatch, PolicyRefusal, PrivacyRefusal, UnsupportedModel
from offsite.privacy.accountants import ACCOUNTANTS
from offsite.protos import codec
from offsite.protos.job_manifest import JobManifest
from tests.faults.conftest import wait_for
from tests.memory_federation import NOW, RunningSite, World, make_world


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(fed, tmp_path_factory.mktemp("service"))


def offered(site: RunningSite, state: str = "ready") -> codec.OfferReply:
    """Offers a job until the site reports a state."""
    for _ in range(3000):
        reply = site.ask("offer", site.world.offer(site.name))
        assert isinstance(reply, codec.OfferReply), reply
        if reply.state == state:
            return reply
        time.sleep(0.01)
    raise AssertionError(reply)


def train(site: RunningSite) -> codec.Message:
    world = site.world
    return site.ask("train", codec.TrainRequest(world.manifest.digest(), 1, world.start))


def notes(site: RunningSite) -> list[str]:
    return [json.loads(line)["kind"] for line in (site.folder / "audit.jsonl").read_text().splitlines()]


def test_nothing_is_trained_before_its_owner_has_approved(world: World, tmp_path: Path) -> None:
    """The package is fetched and opened meanwhile, for a dry run; an approval and its end count at once."""
    site = RunningSite(world, "ash", tmp_path / "ash", policy={"approval": "manual"})
    reply = offered(site, "waiting")
    assert reply.detail == "the data owner has not approved this job yet"
    assert site.service._loader is not None
    site.service._loader.wait(30)
    assert (tmp_path / "ash" / "packages" / world.manifest.emulator).is_dir()
    assert offered(site, "waiting").fetched == world.delivery.size
    refusal = train(site)
    assert isinstance(refusal, codec.Refusal)
    assert refusal.kind == "PolicyRefusal"
    site.approve()
    offered(site)
    assert isinstance(train(site), codec.TrainReply)
    site.withdraw()
    assert isinstance(train(site), codec.Refusal)
    assert offered(site, "waiting")


def test_its_owner_is_told_how_a_job_stands(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log names each change once, however often the coordinator asks; foreign words stand in quotes."""
    caplog.set_level("INFO", "offsite.client")
    site = RunningSite(world, "ash", tmp_path / "ash", policy={"approval": "manual"})
    offered(site, "waiting")
    assert site.service._loader is not None
    site.service._loader.wait(30)
    for _ in range(3):
        offered(site, "waiting")
    site.approve()
    offered(site)
    for _ in range(2):
        train(site)
        offered(site)
    site.ask("abort", codec.Notice("abort", "\x1b[2J"))
    passing = ("job offered: its package is fetched and vetted", "job approved, its data are read")  # if it takes long
    assert [line for line in caplog.messages if line not in passing] == [
        "job waiting: the data owner has not approved this job yet; beside this run, look with offsite client inspect, "
        "and agree with offsite client approve",
        "job ready",
        "round 1: trained",
        "the coordinator gave the round up: ' [2J'",
    ]


def test_its_owner_is_told_of_a_refusal(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "offsite.client")
    site = RunningSite(world, "ash", tmp_path / "ash", policy={"max_rank": 1})
    for _ in range(2):
        site.ask("offer", world.offer("ash"))
    (line,) = caplog.messages
    assert line.startswith("job refused: PolicyRefusal: ")
    assert line.endswith("; after a change here, start offsite client run again")


def test_an_owner_hears_once_what_a_job_waits_for(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The coordinator asks twice a second, for hours where an owner is away; log and audit log hold each news once."""
    caplog.set_level("INFO", "offsite.client")
    site, offer = RunningSite(world, "ash", tmp_path / "ash"), world.offer("ash")
    for owners in (offer.owners[:1], offer.owners[:1], offer.owners[:2], offer.owners[:2]):
        site.ask("offer", dataclasses.replace(offer, owners=owners))
    assert [line for line in caplog.messages if line.startswith("job waits")] == [
        "job waits for the signatures of birch, cedar, elm",
        "job waits for the signatures of cedar, elm",
    ]
    site = RunningSite(world, "ash", tmp_path / "other", policy={"max_rank": 1})
    for _ in range(3):
        site.ask("offer", offer)
    assert notes(site).count("answered") == 1


def test_an_epoch_that_has_ended_takes_no_job(world: World, tmp_path: Path) -> None:
    """A site may have run since before the end of its epoch."""
    site = RunningSite(world, "ash", tmp_path / "ash")
    site.change(clock=lambda: NOW + timedelta(days=400))
    reply = site.ask("offer", world.offer("ash"))
    assert isinstance(reply, codec.Refusal)
    assert reply.kind == "Untrusted"
    assert not site.opened


def failing(error: Exception, times: int, honest: Callable[..., Any], seen: list[JobManifest]) -> Callable[..., Any]:
    """Lets a step fail, so many times."""
    left = [times]

    def step(manifest: JobManifest, given: Any) -> Any:
        seen.append(manifest)
        if left[0]:
            left[0] -= 1
            raise error
        return honest(manifest, given)

    return step


def test_what_may_pass_is_tried_again_from_where_it_stood(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site pauses and does not vet again, however often the coordinator asks."""
    monkeypatch.setattr("offsite.client.service.job_loading.PAUSES", (0.3, 300.0))
    site, opened = RunningSite(world, "ash", tmp_path / "ash"), list[JobManifest]()
    open_site = failing(DataError("disk is full"), 2, site._open, opened)
    seen: list[JobManifest] = []
    site.change(open_site=open_site, open_session=failing(DataError(""), 0, lambda *_: world.session, seen))
    for _ in range(5):
        assert offered(site, "refused").detail == f"DataError: {REFUSALS['DataError']}"
        assert site.reason == "DataError: disk is full"
    offered(site)
    assert (len(opened), len(seen)) == (3, 1)
    assert notes(site).count("accepted") == 1


@pytest.mark.parametrize("error", [UnsupportedModel("a trap"), DigestMismatch("another")])
def test_what_cannot_pass_is_not(world: World, tmp_path: Path, error: Exception) -> None:
    """A refused emulator is not vetted again with every offer; an emulator that may be damaged was fetched twice."""
    seen: list[JobManifest] = []
    fetched: list[str] = []
    site = RunningSite(world, "ash", tmp_path / "ash")

    def fetch(digest: str, *others: Any) -> Path:
        fetched.append(digest)
        return site._fetch(digest, *others)

    site.change(open_session=failing(error, 2, lambda *_: world.session, seen), fetch=fetch)
    first = offered(site, "refused")
    for _ in range(5):
        assert offered(site, "refused").detail == first.detail
    damaged = isinstance(error, DigestMismatch)
    assert len(seen) == len(fetched) == (2 if damaged else 1)
    assert (tmp_path / "ash" / "packages" / world.manifest.emulator).is_dir() != damaged


def test_a_package_that_was_damaged_on_the_disk_is_fetched_again(world: World, tmp_path: Path) -> None:
    """As on a machine that lost its power while it unpacked."""
    site = RunningSite(world, "ash", tmp_path / "ash")
    folder = tmp_path / "ash" / "packages" / world.manifest.emulator
    folder.mkdir(parents=True)
    (folder / "torn").touch()

    def open_session(manifest: JobManifest, package: Path) -> Any:
        read_manifest(package, expected_digest=manifest.emulator)
        return world.session

    def checked(manifest: JobManifest, package: Path) -> Any:
        if (package / "torn").exists():
            raise DigestMismatch("torn")
        return open_session(manifest, package)

    site.change(open_session=checked)
    offered(site)
    assert [path.name for path in folder.parent.iterdir()] == [world.manifest.emulator]


def test_a_package_that_was_made_anew_is_tried(world: World, tmp_path: Path) -> None:
    """The coordinator encrypts a package again when its own copy is damaged: another file, the same job."""
    site = RunningSite(world, "ash", tmp_path / "ash")
    fetched: list[str] = []

    def fetch(digest: str, *others: Any) -> Path:
        fetched.append(digest)
        if len(fetched) == 1:
            raise DigestMismatch("another file")
        return site._fetch(world.delivery.sha256.hex(), *others)

    site.change(fetch=fetch)
    broken = world.offer("ash", package=bytes(32))
    for _ in range(3):
        reply = wait_for(lambda: is_refused(site.ask("offer", broken)))
        assert reply.detail == f"DigestMismatch: {REFUSALS['DigestMismatch']}"
        assert site.reason == "DigestMismatch: another file"
    offered(site)
    assert fetched == [bytes(32).hex(), world.delivery.sha256.hex()]


def is_refused(reply: codec.Message) -> codec.OfferReply | None:
    assert isinstance(reply, codec.OfferReply)
    return reply if reply.state == "refused" else None


def test_no_record_is_read_before_the_approval(world: World, tmp_path: Path) -> None:
    """A job that waits for its owner reports the same whatever the data are."""
    site = RunningSite(world, "ash", tmp_path / "ash", policy={"approval": "manual"})
    site.change(open_site=failing(PolicyRefusal("does not fit"), 1, site._open, site.opened))
    waiting = offered(site, "waiting")
    assert site.service._loader is not None
    site.service._loader.wait(30)
    assert site.service._loader.state == "vetted"
    assert dataclasses.replace(offered(site, "waiting"), fetched=0) == dataclasses.replace(waiting, fetched=0)
    assert not site.opened
    site.approve()
    assert offered(site, "refused").detail == f"PolicyRefusal: {REFUSALS['PolicyRefusal']}"
    assert site.reason == "PolicyRefusal: does not fit"
    assert site.opened == [world.manifest]


def test_one_job_is_prepared_at_a_time(world: World, tmp_path: Path) -> None:
    """However jobs come and end, an older fetch is broken off, and a job that only waited never begins."""
    jobs = [dataclasses.replace(world.manifest, model=f"model {number}") for number in range(6)]
    site = RunningSite(world, "ash", tmp_path / "ash")
    running, most, begun = [0], [0], list[str]()

    def open_session(manifest: JobManifest, _: Path) -> Any:
        running[0] += 1
        begun.append(manifest.model)
        most[0] = max(most[0], running[0])
        time.sleep(1.0)  # a vetting cannot be broken off
        running[0] -= 1
        return world.session

    folder = tmp_path / "ash" / "packages" / world.manifest.emulator
    folder.mkdir(parents=True)
    site.change(open_session=open_session)
    for number, job in enumerate(jobs):
        site.ask("offer", world.offer("ash", job))
        if number % 2:
            site.ask("finish", codec.Notice("finish", "over"))
    site.ready()
    assert most == [1]
    assert len(begun) < len(jobs)
    assert begun[-1] == world.manifest.model
    assert [thread.name for thread in threading.enumerate()].count("job loader") == 0


def test_an_approval_that_was_taken_back_meanwhile_does_not_count(world: World, tmp_path: Path) -> None:
    """Also where the approval was there when the job came: no record is read, and no fact about the records leaves."""
    site = RunningSite(world, "ash", tmp_path / "ash", policy={"approval": "manual"})
    vetting = threading.Event()

    def open_session(*_: Any) -> Any:
        assert vetting.wait(10)
        return world.session

    site.change(open_session=open_session)
    offered(site, "waiting")
    site.approve()
    assert offered(site, "fetching")
    site.withdraw()
    vetting.set()
    assert offered(site, "waiting")
    time.sleep(1.0)
    assert not site.opened


def test_a_refusal_that_the_data_made_is_no_answer_without_an_approval(world: World, tmp_path: Path) -> None:
    site = RunningSite(world, "ash", tmp_path / "ash", policy={"approval": "manual"})
    site.change(open_site=failing(PolicyRefusal("the data do not fit"), 1, site._open, []))
    offered(site, "waiting")
    site.approve()
    assert offered(site, "refused").detail == f"PolicyRefusal: {REFUSALS['PolicyRefusal']}"
    assert site.reason == "PolicyRefusal: the data do not fit"
    site.withdraw()
    assert offered(site, "waiting").detail == "the data owner has not approved this job yet"


def test_no_place_of_this_machine_is_told(world: World, tmp_path: Path) -> None:
    site = RunningSite(world, "ash", tmp_path / "ash")
    where = site.folder / "packages" / "x"
    site.change(open_session=failing(UnsupportedModel(f"path={str(where)!r}"), 1, site._open, []))
    assert offered(site, "refused").detail == f"UnsupportedModel: {REFUSALS['UnsupportedModel']}"
    assert site.reason == f"UnsupportedModel: path={str(where)!r}"


def test_only_what_the_policy_permits_is_kept_for_its_owner(world: World, tmp_path: Path) -> None:
    """Offers beyond the policy would fill the list of those that an owner has to look at; the hours may come yet."""
    site = RunningSite(world, "ash", tmp_path / "ash", policy={"approval": "manual", "methods": ("none",)})
    assert isinstance(site.ask("offer", world.offer("ash")), codec.Refusal)
    assert site.jobs.names() == []
    assert "offered" not in notes(site)
    hour = NOW.astimezone().hour
    hours = f"{(hour + 1) % 24:02}:00-{(hour + 2) % 24:02}:00"
    site = RunningSite(world, "ash", tmp_path / "ash", policy={"approval": "manual", "hours": hours})
    refusal = site.ask("offer", world.offer("ash"))
    assert isinstance(refusal, codec.Refusal)
    assert refusal.reason == REFUSALS["PolicyRefusal"]
    assert "hours=" in site.reason
    assert site.jobs.names() == [world.manifest.digest().hex()]


def test_an_approval_that_has_run_out_trains_nothing(world: World, tmp_path: Path) -> None:
    site = RunningSite(world, "ash", tmp_path / "ash", policy={"approval": "manual"})
    offered(site, "waiting")
    site.approve()
    offered(site)
    site.change(clock=lambda: NOW + timedelta(days=30))
    assert isinstance(train(site), codec.Refusal)
    assert offered(site, "waiting")
    assert [kind for kind in notes(site) if kind.startswith("appro")] == ["approved", "approval expired"]


def test_the_same_question_gets_the_same_bytes_until_it_trains_again(world: World, tmp_path: Path) -> None:
    site = RunningSite(world, "ash", tmp_path / "ash", package=world.run.store.package)
    site.ready()
    assert isinstance(train(site), codec.TrainReply)
    from offsite.protos.secagg_params import adapter_digest

    opening = codec.encode(codec.KeysRequest(1, 1, bytes(32), adapter_digest(world.start), world.sites))
    first = site.service.handle("keys", opening)
    assert isinstance(codec.decode(first), codec.SignedBatch)
    assert site.service.handle("keys", opening) == first
    assert isinstance(train(site), codec.TrainReply)  # the update that waits is not trained twice
    again = codec.decode(site.service.handle("keys", opening))
    assert isinstance(again, codec.Refusal)  # the round was claimed, and its keys are gone with the question
    assert "not newer" in site.reason


def test_a_fault_in_the_program_is_told_without_its_words(world: World, tmp_path: Path) -> None:
    site = RunningSite(world, "ash", tmp_path / "ash", package=world.run.store.package)
    site.ready()
    assert site.service._loader is not None

    class Broken:
        def train(self, request: codec.TrainRequest) -> codec.Message:
            raise RuntimeError("w1 w2 w3: a record")

    from offsite.client.site import round_handler as module

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
    from offsite.client.site.release_log import ledger_name
    from offsite.trust.countersign import countersign

    site = RunningSite(world, "ash", tmp_path / "ash")
    name, head = ledger_name("main"), "ab" * 32
    signature = countersign(world.coordinator, "ash", name, 3, head)
    offer = world.offer("ash", ledgers=(codec.LedgerHead(name, 3, head, signature),))
    refusal = site.ask("offer", offer)
    assert isinstance(refusal, codec.Refusal)
    assert refusal.reason == REFUSALS["PrivacyRefusal"]
    assert "an old copy was restored" in site.reason
    forged = world.offer("ash", ledgers=(codec.LedgerHead(name, 3, head, bytes(64)),))
    assert isinstance(site.ask("offer", forged), codec.Refusal)
    other = world.offer("ash", ledgers=(codec.LedgerHead(ledger_name("other"), 3, head, bytes(64)),))
    assert isinstance(
        site.ask("offer", other), codec.OfferReply
    )  # a head of another data set, which is not this ledger's business


def test_the_end_of_a_job_is_an_end(world: World, tmp_path: Path) -> None:
    site = RunningSite(world, "ash", tmp_path / "ash", package=world.run.store.package)
    site.ready()
    site.ask("finish", codec.Notice("finish", "all rounds are done"))
    refusal = train(site)
    assert isinstance(refusal, codec.Refusal)
    assert "no job is ready at this site" in site.reason
    assert "finished" in notes(site)


# What is set aside


def other_job(world: World, number: int) -> JobManifest:
    return dataclasses.replace(world.manifest, identifier=f"{number:02x}" * 32)


def state(site: RunningSite, job: JobManifest) -> codec.OfferReply:
    """Offers a job until the site has decided."""
    for _ in range(3000):
        reply = site.ask("offer", site.world.offer(site.name, job))
        assert isinstance(reply, codec.OfferReply), reply
        if reply.state != "fetching":
            return reply
        time.sleep(0.01)
    raise AssertionError(reply)


def of_one_job(world: World) -> float:
    """The epsilon of one whole job by the ledger's accountant, at the job's delta."""
    number = world.places["ash"]
    return ACCOUNTANTS["rdp"]([plan_for(world.manifest, number).event], 1e-6)


def test_a_job_that_the_cap_does_not_cover_is_never_ready(world: World, tmp_path: Path) -> None:
    """The second of two approved jobs is refused before it trains: no word of data set, cap or spending.

    Once the first has ended, what it did not spend is free, and the second is taken.
    """
    cap = 1.02 * of_one_job(world)
    terms = {"epsilon_cap": cap, "approval": "manual"}
    site = RunningSite(world, "ash", tmp_path / "ash", package=world.run.store.package, policy=terms)
    first, second = other_job(world, 1), other_job(world, 2)
    for job in (first, second):
        assert state(site, job).state == "waiting"
        site.approve(job)
    assert state(site, first).state == "ready"
    assert site.ledger.standing().committed == pytest.approx(of_one_job(world))
    for _ in range(2):
        reply = state(site, second)
        assert (reply.state, reply.detail) == ("refused", f"PrivacyRefusal: {REFUSALS['PrivacyRefusal']}")
        assert isinstance(site.ask("train", codec.TrainRequest(second.digest(), 1, world.start)), codec.Refusal)
    assert f"the cap of data set 'main' is {cap:g}" in (tmp_path / "ash" / "audit.jsonl").read_text()
    assert site.opened == [first]
    assert state(site, first).state == "ready"
    site.ask("finish", codec.Notice("finish", "all rounds are done"))
    assert site.ledger.standing().committed == 0.0
    again = RunningSite(world, "ash", tmp_path / "ash", policy=terms)
    assert state(again, second).state == "ready"
    reply = state(again, first)
    assert reply.state == "refused"


def test_offers_alone_do_not_fill_the_cap_of_an_owner_with_automatic_approval(world: World, tmp_path: Path) -> None:
    """A job that another job took the place of is set aside anew when it comes back."""
    terms = {"epsilon_cap": 1.02 * of_one_job(world)}
    site = RunningSite(world, "ash", tmp_path / "ash", package=world.run.store.package, policy=terms)
    for number in (1, 2, 3, 1):
        job = other_job(world, number)
        assert state(site, job).state == "ready"
        assert site.ledger.reserved_jobs() == {job.digest().hex()}


def test_an_approval_that_was_taken_back_frees_its_reserve(world: World, tmp_path: Path) -> None:
    """An update that was trained before does not leave afterwards."""
    site = RunningSite(world, "ash", tmp_path / "ash", package=world.run.store.package, policy={"approval": "manual"})
    digest = world.manifest.digest().hex()
    state(site, world.manifest)
    site.approve()
    offered(site)
    assert site.ledger.reserved_jobs() == {digest}
    assert isinstance(train(site), codec.TrainReply)
    site.withdraw()
    assert state(site, world.manifest).state == "waiting"
    assert site.ledger.reserved_jobs() == frozenset()
    assert site.service._loader is not None
    assert site.service._loader.site is not None
    with pytest.raises(PrivacyRefusal, match="no reserve of this job"):
        site.service._loader.site._release_log.release(Release(1, site.service._loader.site._event(), world.start, 4))
    assert site.ledger.spent() == 0.0
