"""A site trains on biases that moved as its owner agreed, and on no others."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offsite.cli.job_text import job_lines
from offsite.client.site.round_handler import Site, answer
from offsite.client.training.emulator_session import EmulatorSession
from offsite.coordinator.config.federation_file import read_config
from offsite.coordinator.rounds.exchange import MemoryExchange
from offsite.coordinator.rounds.round import RoundPlan, run_round
from offsite.emulator.runtime.refresh_state import Refresh
from offsite.errors import TooFewSurvivors
from offsite.protos import codec
from offsite.protos.job_manifest import JobManifest
from offsite.protos.secagg_params import adapter_digest
from offsite.simulation.run_folder import Run, simulated_sessions

ALIGNED = 'compress = ["int3:32", "center"]\ngate = -1.0\nrefresh = 1\n'


@dataclass
class World:
    """A job with refreshes, its sites, their emulator, and an honest refresh."""

    manifest: JobManifest
    sites: dict[str, Site]
    session: EmulatorSession
    start: np.ndarray
    honest: Refresh

    def request(self, number: int, refresh: Refresh) -> codec.TrainRequest:
        return codec.TrainRequest(self.manifest.digest(), number, self.start, refresh)

    def ask(self, number: int, refresh: Refresh, site: str = "ash") -> codec.Message:
        return codec.decode(answer(self.sites[site], "train", codec.encode(self.request(number, refresh))))

    def refusal(self, number: int, refresh: Refresh) -> str:
        reply = self.ask(number, refresh)
        assert isinstance(reply, codec.Refusal), reply
        return reply.reason


@pytest.fixture(scope="module")
def run(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = fed.parent / "aligned.toml"
    path.write_text(fed.read_text().replace('compress = ["int4:32"]\ngate = 0.1\n', ALIGNED))
    settings, sha256 = read_config(path)
    run = Run.create(settings, sha256, tmp_path_factory.mktemp("aligned") / "run")
    run.open_job()
    return run


@pytest.fixture(scope="module")
def session(run: Run) -> EmulatorSession:
    """The emulator of all sites; each writes what it trains on before it trains."""
    manifest = run.store.job()
    assert manifest is not None
    return simulated_sessions(run, manifest)["ash"]


@pytest.fixture
def world(run: Run, session: EmulatorSession) -> World:
    manifest = run.store.job()
    assert manifest is not None
    session.refresh(())
    sites = {name: run.site(name, manifest, session) for name in manifest.sites}
    honest = tuple(
        (name, (np.frombuffer(values, "<f2") + np.float16(0.125)).tobytes()) for name, values in session.biases.values()
    )
    return World(manifest, sites, session, session.start, honest)


def test_an_honest_refresh_is_trained_on_and_gone_with_the_next_request(world: World) -> None:
    session = world.session
    shipped = session.biases.values()
    assert world.ask(2, world.honest) == codec.TrainReply(2)
    assert session.biases.values() == world.honest
    pending = world.sites["ash"]._pending
    assert pending is not None
    assert world.ask(2, ()) == codec.TrainReply(2)  # the round is trained again, from the emulator as it was shipped
    assert session.biases.values() == shipped
    other = world.sites["ash"]._pending
    assert other is not None
    assert not np.array_equal(pending.update, other.update)


def changed(edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Refresh], Refresh]:
    def change(honest: Refresh) -> Refresh:
        (name, values), *rest = honest
        return ((name, edit(np.frombuffer(values, "<f2").copy()).astype("<f2").tobytes()), *rest)

    return change


def spoilt(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def edit(values: np.ndarray) -> np.ndarray:
        values[3] = value
        return values

    return edit


HOSTILE: dict[str, tuple[Callable[[Refresh], Refresh], str]] = {
    "nan": (changed(spoilt(np.nan)), "a value is not finite"),
    "infinite": (changed(spoilt(-np.inf)), "a value is not finite"),
    "huge": (changed(spoilt(60000.0)), "vetting weight_peak"),
    "drowning": (changed(lambda values: values * 0 + 999), "vetting "),
    "short": (changed(lambda values: values[:-1]), "must be 64"),
    "long": (changed(lambda values: np.append(values, values)), "must be 64"),
    "missing": (lambda honest: honest[1:], "exactly the 4 biases"),
    "verbatim block": (lambda h: (("model.layers.0.mlp.down_proj.bias", h[0][1]), *h), "exactly the 4 biases"),
    "weight": (lambda h: (*h, ("model.layers.2.mlp.up_proj.weight", h[0][1])), "exactly the 4 biases"),
    "adapter": (lambda h: (*h, ("z.lora_B.default.weight", h[0][1])), "exactly the 4 biases"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_does_not_belong_there_is_refused_and_leaves_nothing(world: World, kind: str) -> None:
    hostile, reason = HOSTILE[kind]
    session = world.session
    shipped = session.biases.values()
    moved = hostile(world.honest)
    assert reason in world.refusal(2, tuple(sorted(moved)))
    assert session.biases.values() == shipped
    assert world.sites["ash"]._pending is None
    assert reason in world.refusal(2, tuple(sorted(moved)))  # a second request is checked again


def test_it_moves_only_where_the_approved_job_says_so(world: World) -> None:
    assert "refresh=1, so the emulator's biases do not move before this round" in world.refusal(1, world.honest)
    site = world.sites["ash"]
    site._manifest = world.manifest = replace(world.manifest, refresh=0)
    assert "the job says refresh=0" in world.refusal(2, world.honest)
    site._manifest = world.manifest = replace(world.manifest, refresh=2)
    assert "the job says refresh=2" in world.refusal(2, world.honest)


def test_sites_with_different_refreshes_have_no_sum(world: World) -> None:
    """A coordinator that gives two sites another emulator than the other two can open neither pair's updates."""
    other = changed(spoilt(0.25))(world.honest)

    def two_faced(name: str) -> Callable[[str, bytes], bytes]:
        def call(stage: str, body: bytes) -> bytes:
            message = codec.decode(body)
            if name in ("ash", "birch") and isinstance(message, codec.TrainRequest):
                body = codec.encode(world.request(message.round, other))
            if name in ("ash", "birch") and isinstance(message, codec.KeysRequest):
                start = adapter_digest(world.start, other)
                body = codec.encode(
                    codec.KeysRequest(message.round, message.sequence, message.nonce, start, message.invited)
                )
            return answer(world.sites[name], stage, body)

        return call

    plan = RoundPlan(2, 1, bytes(32), tuple(world.sites))
    exchange = MemoryExchange({name: two_faced(name) for name in world.sites})
    with pytest.raises(TooFewSurvivors):
        run_round(world.manifest, plan, world.start, exchange, refresh=world.honest)
    plan = RoundPlan(2, 2, bytes(32), tuple(world.sites))
    honest = {name: lambda stage, body, s=site: answer(s, stage, body) for name, site in world.sites.items()}
    result = run_round(world.manifest, plan, world.start, MemoryExchange(honest), refresh=world.honest)
    assert result.members == tuple(sorted(world.sites))


def test_an_owner_reads_that_biases_may_move(world: World) -> None:
    asked: dict[str, Any] = {"site": "ash", "folder": "ash", "approved": False, "records": 100, "delta": 1e-6}
    asked |= {"room": None, "cost": ""}
    said = "\n".join(job_lines(world.manifest, **asked))
    assert "refresh    after every 1 rounds the biases at the ends of the emulator's middle blocks may move" in said
    still = replace(world.manifest, refresh=0)
    assert "never: the emulator stays as it was fetched" in "\n".join(job_lines(still, **asked))


def test_the_start_of_a_training_is_named_by_all_that_it_starts_from(world: World) -> None:
    plain, moved = adapter_digest(world.start), adapter_digest(world.start, world.honest)
    names = tuple((f"{name}x", values) for name, values in world.honest)
    assert len({plain, moved, adapter_digest(world.start, names), adapter_digest(world.start, world.honest[1:])}) == 4
