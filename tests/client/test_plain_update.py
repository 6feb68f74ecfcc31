"""Updates in the open, at real sites: only as permitted, once, signed for one round, and entered before they leave."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from offsite.cli.job_text import job_lines
from offsite.client.training.local_update import SiteJob, local_update
from offsite.coordinator.rounds.exchange import MemoryExchange
from offsite.coordinator.rounds.round import RoundPlan, RoundResult, run_round
from offsite.errors import TooFewSurvivors
from offsite.privacy.randomness import Randomness
from offsite.protos import codec
from offsite.protos.sealed_update import UPDATE, close, digest_of, key_of, unclose
from offsite.protos.secagg_params import adapter_digest, secagg_params
from offsite.secagg import signed_bodies
from offsite.secagg.params import SecAggParams
from tests.memory_federation import RunningSite, World, make_world
from tests.rule_worlds import examples_of, written

PERMITTED = {"allow_individual_updates": True}
SECRET = bytes([9] * 32)
Change = Callable[[codec.UpdateReply], codec.UpdateReply]


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(written(fed, "median", secagg=False), tmp_path_factory.mktemp("open"))


def opened(world: World, folder: Path) -> dict[str, RunningSite]:
    found = {
        name: RunningSite(world, name, folder / name, policy=PERMITTED, package=world.run.store.package)
        for name in world.sites
    }
    for site in found.values():
        site.ready()
    return found


@pytest.fixture
def sites(world: World, tmp_path: Path) -> dict[str, RunningSite]:
    return opened(world, tmp_path)


def plan(number: int, sequence: int, sites: Iterable[str]) -> RoundPlan:
    return RoundPlan(number, sequence, bytes([sequence] * 32), tuple(sorted(sites)), SECRET)


def opening(world: World, sequence: int = 1, number: int = 1) -> codec.KeysRequest:
    return codec.KeysRequest(number, sequence, bytes(32), adapter_digest(world.start), invited=world.sites)


def request(world: World, sequence: int = 1, number: int = 1) -> codec.UpdateRequest:
    return codec.UpdateRequest(opening(world, sequence, number), key_of(SECRET).public)


def through(sites: dict[str, RunningSite], kept: dict[tuple[str, str], bytes] | None = None) -> MemoryExchange:
    """An exchange with the sites themselves that keeps their answers, to be played again."""

    def handle(name: str, stage: str, body: bytes) -> bytes:
        reply = sites[name].service.handle(stage, body)
        if kept is not None:
            kept[name, stage] = reply
        return reply

    return MemoryExchange({name: partial(handle, name) for name in sites})


@pytest.fixture(scope="module")
def answers(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], bytes]:
    """The answers of honest sites in the first round."""
    kept: dict[tuple[str, str], bytes] = {}
    sites = opened(world, tmp_path_factory.mktemp("honest"))
    run_round(world.manifest, plan(1, 1, sites), world.start, through(sites, kept))
    return kept


def again(world: World, answers: dict[tuple[str, str], bytes], changed: str, change: Change) -> RoundResult:
    """The same round, in which the update of one site is changed on its way."""

    def play(name: str, stage: str, body: bytes) -> bytes:
        message = codec.decode(answers[name, stage])
        if name == changed and isinstance(message, codec.UpdateReply):
            return codec.encode(change(message))
        return answers[name, stage]

    exchange = MemoryExchange({name: partial(play, name) for name in world.sites})
    return run_round(world.manifest, plan(1, 1, world.sites), world.start, exchange)


def test_what_arrives_is_what_each_site_trained(world: World, sites: dict[str, RunningSite]) -> None:
    heads: dict[str, codec.LedgerHead | None] = {}
    result = run_round(world.manifest, plan(1, 1, sites), world.start, through(sites), heads.__setitem__)
    assert result.individuals is not None
    assert result.members == world.sites
    assert (result.threshold, result.faulty, result.refused) == (3, (), ())
    for name, found in zip(result.members, result.individuals, strict=True):
        examples = examples_of(world.run, name, world.manifest, world.sessions[name])
        numbers = world.run.site(name, world.manifest, world.sessions[name]).plan
        job = SiteJob(name, world.manifest, world.sessions[name], examples, numbers)
        alone = local_update(job, world.start, randomness=Randomness.for_simulation(1, "noise", name, "1"))
        np.testing.assert_array_equal(found, alone.update)
    np.testing.assert_allclose(result.update, result.individuals.mean(axis=0))
    for name, site in sites.items():
        assert heads[name] is not None
        assert (heads[name].count, heads[name].head) == site.ledger.head()
        assert site.ledger.releases(world.manifest.digest().hex()) == 1
        audit = [json.loads(line) for line in (site.folder / "audit.jsonl").read_text().splitlines()]
        kinds = [line["kind"] for line in audit]
        left = [line for line in audit if line["fields"].get("stage") == "update"]
        assert len(left) == 1
        assert kinds.index("egress") < audit.index(left[0])


def test_an_owner_who_does_not_permit_it_is_not_in_the_job(world: World, tmp_path: Path) -> None:
    site = RunningSite(world, "ash", tmp_path / "ash", package=world.run.store.package)
    reply = site.ask("offer", world.offer("ash"))
    assert isinstance(reply, codec.Refusal)
    assert reply.kind == "PolicyRefusal"
    assert "allow_individual_updates=false" in site.reason
    assert not site.opened


def test_an_update_leaves_once(world: World, sites: dict[str, RunningSite]) -> None:
    """The same question gets the same bytes; another question, with another number, gets no update."""
    site, training = sites["ash"], codec.TrainRequest(world.manifest.digest(), 1, world.start)
    assert site.ask("train", training) == codec.TrainReply(1)
    ask = codec.encode(request(world))
    first = site.service.handle("update", ask)
    assert isinstance(codec.decode(first), codec.UpdateReply)
    assert site.service.handle("update", ask) == first
    assert site.ledger.head()[0] == 2  # the reserve of the job, and one release
    more = site.ask("update", request(world, sequence=2))
    assert isinstance(more, codec.Refusal)
    assert "no update of this round is waiting" in site.reason
    assert site.ask("train", dataclasses.replace(training, round=2)) == codec.TrainReply(2)
    old = site.ask("update", request(world, sequence=1, number=2))
    assert isinstance(old, codec.Refusal)
    assert "is not newer than" in site.reason
    assert site.ledger.head()[0] == 2


def test_a_second_round_draws_other_noise(world: World, sites: dict[str, RunningSite]) -> None:
    first = run_round(world.manifest, plan(1, 1, sites), world.start, through(sites))
    repeated = run_round(world.manifest, plan(1, 2, sites), world.start, through(sites))
    assert first.individuals is not None
    assert repeated.individuals is not None
    assert (first.individuals != repeated.individuals).all()
    with pytest.raises(TooFewSurvivors, match="PrivacyRefusal"):
        run_round(world.manifest, plan(2, 3, sites), world.start, through(sites))
    assert all("planned for 2 and covers no more" in site.reason for site in sites.values())


def test_a_job_is_one_way_or_the_other(world: World, sites: dict[str, RunningSite], fed: Path, tmp_path: Path) -> None:
    site = sites["ash"]
    site.ask("train", codec.TrainRequest(world.manifest.digest(), 1, world.start))
    reply = site.ask("keys", opening(world))
    assert isinstance(reply, codec.Refusal)
    assert "this job has no secure aggregation" in site.reason
    secret = make_world(fed, tmp_path / "secret")
    other = RunningSite(secret, "ash", tmp_path / "other", policy=PERMITTED, package=secret.run.store.package)
    other.ready()
    other.ask("train", codec.TrainRequest(secret.manifest.digest(), 1, secret.start))
    reply = other.ask("update", request(secret))
    assert isinstance(reply, codec.Refusal)
    assert "leaves masked, or not at all" in other.reason
    assert other.ledger.head()[0] == 1  # its reserve


def _asked(world: World) -> codec.KeysRequest:
    return codec.KeysRequest(1, 1, bytes([1] * 32), adapter_digest(world.start), invited=world.sites)


def _terms(world: World) -> SecAggParams:
    return secagg_params(world.manifest, _asked(world))


def _sealed_again(world: World, reply: codec.UpdateReply, box: bytes) -> codec.UpdateReply:
    """Signs another box as the site itself would."""
    found = signed_bodies.sign(world.identities["elm"], UPDATE, _terms(world).t0(), "elm", digest_of(box))
    return dataclasses.replace(reply, box=box, commitment=found)


def _with_first(world: World, value: float, extra: int = 0) -> Change:
    """The site's update with another first value, and further ones behind it."""

    def change(reply: codec.UpdateReply) -> codec.UpdateReply:
        update = unclose(reply.box, _terms(world), "elm", key_of(SECRET))
        update = np.append(update, np.zeros(extra, dtype=np.float32)).astype(np.float32)
        update[0] = value
        return _sealed_again(world, reply, close(update, _terms(world), "elm", key_of(SECRET).public))

    return change


def _bad(world: World, answers: dict[tuple[str, str], bytes]) -> dict[str, tuple[Change, str]]:
    bound, terms, size = world.manifest.update_bound, _terms(world), world.manifest.upload_size(1)

    def named(sender: str) -> Change:
        return lambda r: dataclasses.replace(r, commitment=dataclasses.replace(r.commitment, sender=sender))

    def closed(key: bytes, terms: SecAggParams) -> Change:
        return lambda r: _sealed_again(world, r, close(np.zeros(size, np.float32), terms, "elm", key))

    def copied(reply: codec.UpdateReply) -> codec.UpdateReply:
        other = codec.decode(answers["ash", "update"])
        assert isinstance(other, codec.UpdateReply)
        return _sealed_again(world, reply, other.box)

    def forged(reply: codec.UpdateReply) -> codec.UpdateReply:
        return dataclasses.replace(reply, commitment=dataclasses.replace(reply.commitment, signature=bytes(64)))

    other_round, key = dataclasses.replace(terms, round=2), key_of(SECRET).public
    return {
        "not a number": (_with_first(world, np.nan), "outside the clip or not finite"),
        "infinite": (_with_first(world, np.inf), "outside the clip or not finite"),
        "too large": (_with_first(world, bound * 1.01), "outside the clip or not finite"),
        "too long": (_with_first(world, 0.0, extra=1), f"not an update of {size} entries"),
        "nothing": (lambda reply: _sealed_again(world, reply, b""), f"not an update of {size} entries"),
        "another's name": (named("ash"), "site 'elm' was asked"),
        "another's update": (copied, "does not open"),
        "another key": (closed(key_of(bytes(32)).public, terms), "does not open"),
        "another round": (closed(key, other_round), "does not open"),
        "altered and signed": (lambda r: _sealed_again(world, r, r.box[:-1] + bytes([r.box[-1] ^ 1])), "does not open"),
        "altered": (lambda r: dataclasses.replace(r, box=r.box[:-1]), "signed the hash of another update"),
        "no signature": (forged, "signature"),
    }


KINDS = [
    *("not a number", "infinite", "too large", "too long", "nothing", "another's name", "another's update"),
    *("another key", "another round", "altered and signed", "altered", "no signature"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_update_costs_its_site_the_round_and_nobody_else(
    world: World, answers: dict[tuple[str, str], bytes], kind: str
) -> None:
    bad = _bad(world, answers)
    assert list(bad) == KINDS
    change, words = bad[kind]
    assert again(world, answers, "elm", _with_first(world, 0.0)).members == world.sites
    result = again(world, answers, "elm", change)
    assert result.members == ("ash", "birch", "cedar")
    ((site, stage, reason),) = [(one.site, one.stage, one.reason) for one in result.refused]
    assert (site, stage) == ("elm", "update")
    assert words in reason


def test_nobody_between_reads_an_update(world: World, answers: dict[tuple[str, str], bytes]) -> None:
    """No eight entries in a row of an update stand in the answers that carry the update."""
    result = again(world, answers, "elm", lambda reply: reply)
    assert result.individuals is not None
    for name, row in zip(result.members, result.individuals, strict=True):
        update, answer = row.astype("<f4").tobytes(), answers[name, "update"]
        assert len(answer) > len(update) > 32
        assert not any(update[place : place + 32] in answer for place in range(0, len(update) - 31, 4))
        reply = codec.decode(answer)
        assert isinstance(reply, codec.UpdateReply)
        assert unclose(reply.box, _terms(world), name, key_of(SECRET)).tobytes() == update


def test_a_key_that_is_none_opens_nothing_and_costs_no_privacy(world: World, sites: dict[str, RunningSite]) -> None:
    site = sites["ash"]
    site.ask("train", codec.TrainRequest(world.manifest.digest(), 1, world.start))
    right = request(world)
    short = site.ask("update", dataclasses.replace(right, sealing=right.sealing[:-1]))
    assert isinstance(short, codec.Refusal)
    assert "sealing_bytes=1215: the key has 1216" in site.reason
    no_key = site.ask("update", dataclasses.replace(right, sealing=b"\xff" * 1216))
    assert isinstance(no_key, codec.Refusal)
    assert no_key.kind == "Untrusted"
    assert site.ledger.head()[0] == 1  # the reserve of the job


def test_too_few_updates_are_no_round(world: World, sites: dict[str, RunningSite]) -> None:
    def silent(stage: str, body: bytes) -> bytes:
        return b"" if stage == "update" else sites["elm"].service.handle(stage, body)

    few = {name: sites[name].service.handle for name in ("ash", "birch")} | {"elm": silent}
    with pytest.raises(TooFewSurvivors, match="sites=2 after update: 3 are needed"):
        run_round(world.manifest, plan(1, 1, few), world.start, MemoryExchange(few))


def test_an_owner_reads_it_before_approving(world: World) -> None:
    shown = job_lines(
        world.manifest, site="ash", folder="ash", approved=False, records=None, delta=1e-6, room=None, cost=""
    )
    assert any(line.startswith("leaves     one signed, plain update") for line in shown)
