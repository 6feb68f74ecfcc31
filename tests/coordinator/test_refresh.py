"""Between rounds the emulator is aligned anew; a refresh is small, kept where better, and the same after a restart."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offsite.cli.display import PlainDisplay
from offsite.client.training.local_update import SiteJob, local_update
from offsite.coordinator.aggregation.rules import AGGREGATORS, RuleSettings, ServerState
from offsite.coordinator.job.json_form import encode
from offsite.coordinator.job.round_record import RoundRecord
from offsite.coordinator.job.store import Progress
from offsite.coordinator.report.model import Report
from offsite.coordinator.report.rounds_section import refreshes
from offsite.coordinator.rounds.emulator_refresh import DeployedEmulator, RefreshTrial
from offsite.emulator.runtime.refresh import plain_of
from offsite.emulator.runtime.refresh_state import size_of
from offsite.errors import ConfigError
from offsite.privacy.randomness import Randomness
from offsite.secagg import ring
from offsite.simulation.run_folder import Run, simulated_sessions
from offsite.simulation.simulate import simulate
from tests.cli.test_simulate import StopAfter, open_run, options, weights

pytestmark = pytest.mark.slow  # whole simulations

ALIGNED = """compress = ["lowrank:0.25", "center"]
gate = -1.0
refresh = 1
"""


@pytest.fixture(scope="module")
def refreshing(fed: Path) -> Path:
    """The federation file of the tiny world, with a coarse emulator that is refreshed after every round."""
    path = fed.parent / "refreshing.toml"
    path.write_text(fed.read_text().replace('compress = ["int4:32"]\ngate = 0.1\n', ALIGNED))
    return path


@pytest.fixture(scope="module")
def finished(refreshing: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Report]:
    run = open_run(refreshing, tmp_path_factory.mktemp("runs") / "refreshed", rounds=3)
    return run, simulate(run, options())


def progress_of(run: Run) -> Progress:
    progress = run.store.load_state()
    assert progress is not None
    return progress


def test_a_line_tells_what_a_refresh_weighs_and_does(finished: tuple[Run, Report]) -> None:
    run, report = finished
    first, second, third = run.store.rounds()
    assert first.refreshed
    assert first.emulator_loss[1] < first.emulator_loss[0]
    assert first.refresh_bytes == 0  # what it brought goes with the next round
    for line in (second, third):
        assert 0 < line.refresh_bytes <= 0.02 * report.emulators.default.package_bytes
        assert line.refresh_share == line.refresh_bytes / report.emulators.default.package_bytes
        assert line.bytes_down > first.bytes_down + 4 * line.refresh_bytes
    assert third.refreshed is None  # nobody trains on it any more
    assert third.refresh_bytes == size_of(progress_of(run).refresh)
    (sentence,) = refreshes(report.rounds)
    assert sentence in (run.store.folder / "report.md").read_text()


def test_sites_train_on_the_refreshed_emulator(refreshing: Path, tmp_path: Path) -> None:
    """A plain loop over the sites gives the second adapter, on an emulator whose biases were written by hand."""
    run = open_run(refreshing, tmp_path / "run", rounds=2)
    with pytest.raises(KeyboardInterrupt):
        simulate(run, options(StopAfter(1)))
    before = progress_of(run)
    simulate(Run.open(run.store.folder), options())
    manifest = run.store.job()
    assert manifest is not None
    assert before.refresh
    session = simulated_sessions(run, manifest)["ash"]
    shipped = copy.deepcopy(plain_of(session.model).state_dict())
    with torch.no_grad():
        for name, values in before.refresh:
            parameter = plain_of(session.model).get_parameter(name)
            parameter.copy_(torch.from_numpy(np.frombuffer(values, np.float16).astype(np.float32)))
            assert not torch.equal(parameter, shipped[name])
    total = np.zeros(before.server.adapter.size, dtype=np.uint32)
    for name, _ in manifest.roster:
        setting = next(site for site in run.config.sites if site.name == name)
        examples, plan = run.examples(setting.train, manifest, session), run.site(name, manifest, session).plan
        trained = local_update(
            SiteJob(name, manifest, session, examples, plan),
            before.server.adapter,
            randomness=Randomness.for_simulation(1, "noise", name, "2"),
        )
        draw = Randomness.for_simulation(1, "rounding", name, "2").uniform
        total += ring.encode(trained.update, clip=manifest.update_bound, members=4, randomness=draw)
    mean = ring.decode(total, clip=manifest.update_bound, members=4, summed=4) / 4
    after, scale = progress_of(run), run.store.rounds()[1].scale
    expected = AGGREGATORS["fedadam"].step(before.server, mean * scale, RuleSettings(0.02, 0.9)).adapter
    np.testing.assert_array_equal(after.server.adapter, expected)


class StopAt(PlainDisplay):
    """Presses Ctrl-C in the middle of a round."""

    def __init__(self, stage: str, calls: int) -> None:
        super().__init__()
        self._stage, self._left = stage, calls

    def call(self, stage: str, site: str) -> None:
        self._left -= stage == self._stage
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "stop", [StopAfter(1), StopAt("train", 6), StopAt("masked", 5)], ids=["between", "training", "masked"]
)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    refreshing: Path, tmp_path: Path, finished: tuple[Run, Report], stop: PlainDisplay
) -> None:
    run = open_run(refreshing, tmp_path / "stopped", rounds=3)
    with pytest.raises(KeyboardInterrupt):
        simulate(run, options(stop))
    again = Run.open(tmp_path / "stopped")
    simulate(again, options())
    assert weights(again) == weights(finished[0])
    state = "state.safetensors"
    assert (again.store.folder / state).read_bytes() == (finished[0].store.folder / state).read_bytes()
    for mine, theirs in zip(again.store.rounds(), finished[0].store.rounds(), strict=True):
        for key in ("refresh_bytes", "refreshed", "emulator_loss", "public_loss", "accepted", "correction"):
            assert getattr(mine, key) == getattr(theirs, key), key


@pytest.fixture
def shipped(refreshing: Path, tmp_path: Path) -> DeployedEmulator:
    run = open_run(refreshing, tmp_path / "prepared", rounds=3)
    return DeployedEmulator.open(run.store.package, run.open_job())


def started(shipped: DeployedEmulator, **more: Any) -> Progress:
    return Progress(ServerState.start(shipped.job.start), 1, 1.0, **more)


def test_an_emulator_that_was_led_astray_is_led_back(shipped: DeployedEmulator) -> None:
    """Every bias was pushed off by a whole unit. Only a refresh can take that back, so the public loss must fall."""
    shipped.biases.put(())
    near = shipped._loss()
    for bias in shipped.biases.tensors.values():
        bias.data += torch.randn(bias.shape, generator=torch.Generator().manual_seed(2))
    progress = started(shipped, refresh=shipped.biases.values())
    moved, trial = shipped.refreshed(progress)
    before, after = trial.losses
    assert trial.kept
    assert before is not None
    assert after is not None
    assert moved != progress.refresh
    assert after < before - 0.5 * (before - near)
    assert shipped.refreshed(progress) == (moved, trial)


def fitted_to_one_word(shipped: DeployedEmulator, word: int) -> DeployedEmulator:
    """The same coordinator, with a calibration text that repeats a single word."""
    two = shipped.job.public.calibration.select([0, 1])
    dull = dataclasses.replace(two, input_ids=torch.full_like(two.input_ids, word))
    public = dataclasses.replace(shipped.job.public, calibration=dull)
    return dataclasses.replace(shipped, job=dataclasses.replace(shipped.job, public=public))


def risen(trial: RefreshTrial) -> float:
    before, after = trial.losses
    assert before is not None
    assert after is not None
    return after - before


def test_a_refresh_that_does_harm_is_not_kept(shipped: DeployedEmulator) -> None:
    """A fit to a single word raises the loss on real text, at least for some word: the tiny model knows few words."""
    progress = started(shipped)
    tried = []
    for word in range(5, 15):
        shipped.biases.put(())
        tried.append(fitted_to_one_word(shipped, word).refreshed(progress))
    kept, trial = max(tried, key=lambda one: risen(one[1]))
    assert risen(trial) > 0
    assert not trial.kept
    assert kept == ()
    refused = RoundRecord(1, (), refresh_bytes=0, refresh_share=0.0, refreshed=False, emulator_loss=trial.losses)
    (said,) = refreshes([refused])
    assert said.startswith("The emulator was refreshed 1 times on trial; no refresh lowered its loss, and the emulator")


def test_a_recipe_without_a_bias_promises_no_refresh(fed: Path, tmp_path: Path) -> None:
    path = fed.parent / "unmoved.toml"
    path.write_text(fed.read_text().replace("gate = 0.1", "gate = 0.1\nrefresh = 1"))
    with pytest.raises(ConfigError, match=r'emulator.refresh=1: .* add "center" behind the quantiser, or set'):
        simulate(open_run(path, tmp_path / "run"), options())


def test_without_refreshes_nothing_is_said_of_them(fed: Path, tmp_path: Path) -> None:
    run = open_run(fed, tmp_path / "plain", rounds=1)
    report = simulate(run, options())
    assert refreshes(report.rounds) == ()
    assert progress_of(run).refresh == ()
    assert "refresh" not in json.dumps(encode(report.rounds))
