"""Where ranks differ and sites go missing, a part of the sum may be of few sites; the sites refuse to open the sum."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from offsite.client.site.round_handler import Site, answer
from offsite.client.training.emulator_session import EmulatorSession
from offsite.coordinator.config.federation_file import read_config
from offsite.coordinator.rounds.exchange import MemoryExchange
from offsite.coordinator.rounds.round import RoundPlan, RoundResult, run_round
from offsite.errors import TooFewSurvivors
from offsite.protos import codec
from offsite.protos.job_manifest import JobManifest
from offsite.simulation.run_folder import Run, simulated_sessions
from tests.rule_worlds import written

SITES = ("ash", "birch", "cedar", "elm")  # elm has rank 1 of 3
Opened = tuple[JobManifest, dict[str, Site], np.ndarray]


@pytest.fixture(scope="module")
def made(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, JobManifest, EmulatorSession]:
    settings, sha256 = read_config(written(fed, "nested"))
    run = Run.create(settings, sha256, tmp_path_factory.mktemp("thin") / "run")
    manifest = run.open_job().manifest
    return run, manifest, simulated_sessions(run, manifest)["ash"]


@pytest.fixture
def opened(made: tuple[Run, JobManifest, EmulatorSession]) -> Opened:
    run, manifest, session = made
    return manifest, {name: run.site(name, manifest, session) for name in SITES}, session.start


@dataclass
class Heard:
    """A coordinator's questions to the sites, and the sites' refusals by stage."""

    stages: list[str] = field(default_factory=list)
    refusals: dict[str, set[str]] = field(default_factory=dict)


def run_without(opened: Opened, silent: str, at: str, heard: Heard) -> RoundResult:
    """Runs a round in which a site falls silent."""
    manifest, sites, start = opened

    def handle(name: str, stage: str, body: bytes) -> bytes:
        heard.stages.append(stage)
        reply = b"" if (name, stage) == (silent, at) else answer(sites[name], stage, body)
        if reply and isinstance(message := codec.decode(reply), codec.Refusal):
            heard.refusals.setdefault(stage, set()).add(message.reason)
        return reply

    exchange = MemoryExchange({name: partial(handle, name) for name in SITES})
    return run_round(manifest, RoundPlan(1, 1, bytes(32), SITES), start, exchange)


@pytest.mark.parametrize(
    ("silent_at", "refused_at"), [("train", "keys"), ("keys", "masked"), ("shares", "masked"), ("masked", "survivors")]
)
def test_a_sum_of_which_a_part_is_that_of_two_is_not_opened(opened: Opened, silent_at: str, refused_at: str) -> None:
    """Each site refuses at the next step that shows the remaining sites, if possible before its update has left."""
    heard = Heard()
    with pytest.raises(TooFewSurvivors, match=f"sites=0 after {refused_at}"):
        run_without(opened, "ash", silent_at, heard)
    assert heard.stages[-1] == refused_at
    assert list(heard.refusals) == [refused_at]
    (reason,) = heard.refusals[refused_at]
    assert reason.startswith("rank=3: only 2 of 3 sites train so many columns")
    kept = [site._pending is not None for name, site in opened[1].items() if name != "ash"]
    assert kept == [silent_at != "masked"] * 3


@pytest.mark.parametrize("stage", ["train", "masked"])
def test_the_site_of_smaller_rank_may_go_missing(opened: Opened, stage: str) -> None:
    result = run_without(opened, "elm", stage, Heard())
    assert result.members == ("ash", "birch", "cedar")
    assert (result.update != 0).all()
