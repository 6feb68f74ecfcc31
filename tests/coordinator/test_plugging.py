"""The emulator's repair stays out of the full model when that is better on public text, and only then."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.coordinator.job.evaluate import score
from offsite.coordinator.job.prepare import public_records
from offsite.coordinator.job.store import Progress
from offsite.coordinator.report.model import Report
from offsite.emulator.package.package_reader import load
from offsite.emulator.runtime.correction import STRENGTHS
from offsite.emulator.runtime.plug_in import plug
from offsite.simulation.run_folder import Run
from offsite.simulation.simulate import simulate
from offsite.task.tasks import TASKS
from tests.cli.test_simulate import open_run, options

pytestmark = pytest.mark.slow  # two whole simulations
TASK = TASKS["causal_lm"]
PARALLEL = """last = 1
shape = "parallel"
compress = ["prune_2_4", "int3:32"]
gate = -1.0

[adapter]
method = "lora"

[privacy]
private = false
"""


@pytest.fixture(scope="module")
def finished(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Report]:
    """Runs one round of a coarse parallel emulator, with so long a training that the adapter repairs the emulator.

    Half the weights are gone and the rest has 3 bits. The correction gains 2e-4 nats; at four times the learning rate
    the training is chaotic, and the last bits of the arithmetic decide whether there is a gain.
    """
    text = fed.read_text().replace('last = 1\ncompress = ["int4:32"]\ngate = 0.1\n', PARALLEL)
    text = text.replace("rounds = 2", "rounds = 1\nlocal_steps = 192\nlearning_rate = 0.5")
    path = fed.parent / "parallel.toml"
    path.write_text(text.replace("[aggregation]", '[aggregation]\nrule = "mean"'))
    run = open_run(path, tmp_path_factory.mktemp("runs") / "parallel")
    return run, simulate(run, options())


def progress_of(run: Run) -> Progress:
    progress = run.store.load_state()
    assert progress is not None
    return progress


def full_with_adapter(run: Run) -> Any:
    manifest = run.store.job()
    assert manifest is not None
    return attach(TASK.load(run.config.model.path, dtype=torch.float32), manifest.adapter)


def public_loss(run: Run, vector: np.ndarray) -> float:
    full = full_with_adapter(run)
    plug(full, Layout.of(full), vector)
    config = run.config
    processor, records = TASK.load_processor(config.model.path), run.records(config.data.public)
    public = public_records(config, TASK, processor, records, full.config)
    return score(TASK, full, public.test, batch=config.training.physical_batch).loss


def by_least_squares(run: Run, strength: float) -> np.ndarray:
    """Returns the tuned adapter without its best fit, on inputs in the span of A, to full minus emulated weights."""
    full, state = full_with_adapter(run), progress_of(run)
    layout = Layout.of(full)
    plug(full, layout, state.server.adapter)
    emulator = load(run.store.package, dtype=torch.float32)
    values = {name: array.copy() for name, array in layout.named(state.server.adapter).items()}
    rng = np.random.default_rng(3)
    for name in [name for name in values if ".lora_B." in name]:
        path = name.split(".lora_B.")[0]
        layer = full.get_submodule(path)
        plain = emulator.get_submodule(path.removeprefix("base_model.model."))
        apart = (layer.base_layer.weight - plain.weight).detach().double().numpy()
        down = layer.lora_A["default"].weight.detach().double().numpy()
        inputs = rng.normal(size=(50, len(down))) @ down  # inputs that span everything that the adapter sees
        seen = layer.scaling["default"] * inputs @ down.T
        step = np.linalg.lstsq(seen, inputs @ apart.T, rcond=None)[0].T
        step *= min(1.0, np.linalg.norm(values[name]) / max(np.linalg.norm(step), 1e-30))
        values[name] = (values[name] - strength * step).astype(np.float32)
    return np.concatenate([values[name].reshape(-1) for name in layout.names])


def test_the_correction_of_least_public_loss_is_taken(finished: tuple[Run, Report]) -> None:
    run, _ = finished
    (line,) = run.store.rounds()
    losses = {strength: public_loss(run, by_least_squares(run, strength)) for strength in STRENGTHS}
    best = min(losses, key=lambda strength: losses[strength])
    assert line.accepted
    assert line.correction == best == progress_of(run).correction
    assert best > 0  # otherwise this world shows nothing
    assert line.public_loss < losses[0.0]
    assert line.public_loss == pytest.approx(losses[best], abs=1e-5)


def test_what_is_exported_and_reported_is_what_is_plugged_in(finished: tuple[Run, Report]) -> None:
    run, report = finished
    state = progress_of(run)
    np.testing.assert_allclose(state.plugged, by_least_squares(run, state.correction), rtol=1e-3, atol=1e-5)
    assert not np.array_equal(
        state.plugged, state.server.adapter
    )  # the sites go on from the adapter that fits their emulator
    layout = Layout.of(full_with_adapter(run))
    named = layout.named(state.plugged)
    exported = load_file(run.store.adapter / "adapter_model.safetensors")
    assert len(exported) == len(named)
    for name, values in exported.items():
        np.testing.assert_array_equal(values, named[name.replace(".weight", ".default.weight")])
    assert report.quality.public.plug_in.loss == run.store.rounds()[0].public_loss


def test_a_finished_run_is_concluded_again_with_the_same_adapter(finished: tuple[Run, Report]) -> None:
    run, _ = finished
    before = (run.store.adapter / "adapter_model.safetensors").read_bytes()
    again = Run.open(run.store.folder)
    simulate(again, options())
    assert (again.store.adapter / "adapter_model.safetensors").read_bytes() == before


def test_in_a_sandwich_nothing_is_corrected(fed: Path, tmp_path: Path) -> None:
    run = open_run(fed, tmp_path / "sandwich", rounds=1)
    simulate(run, options())
    state = progress_of(run)
    assert state.corrected is None
    assert state.plugged is state.server.adapter
    (written,) = [json.loads(one) for one in (run.store.folder / "rounds.jsonl").read_text().splitlines()]
    assert written["correction"] == 0.0
