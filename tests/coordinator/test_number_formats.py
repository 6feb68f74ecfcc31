"""A whole simulation in bfloat16 beside one in float32: gate, clip, vetting, rounds, refresh, plug-in, scores."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offsite.cli.display import PlainDisplay
from offsite.client.training.emulator_session import open_session
from offsite.coordinator.config.compute_table import ComputeConfig
from offsite.coordinator.config.federation_file import FedConfig, read_config
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.privacy.batches import trainable
from offsite.simulation.memory_engine import memory_engine
from offsite.simulation.run_folder import Run, simulated_sessions, with_options
from offsite.simulation.simulate import Options, simulate
from offsite.task.number_format import dtype_of
from tests.cli.test_simulate import StopAfter

Made = tuple[Run, dict[str, Any], torch.Tensor]


@pytest.fixture(scope="module")
def config(fed: Path) -> FedConfig:
    settings = with_options(read_config(fed)[0], seed=None, rounds=2, sites=3)
    compress = (*settings.emulator.compress, "center")
    return replace(settings, emulator=replace(settings.emulator, refresh=1, compress=compress))


def begun(config: FedConfig, folder: Path, dtype: str) -> Run:
    return Run.create(replace(config, compute=ComputeConfig("cpu", dtype)), "0" * 64, folder)


def simulated(run: Run, display: PlainDisplay) -> Made:
    simulate(run, Options(memory_engine, "memory", display, "2026-01-01T00:00:00+00:00"))
    adapter = load_file(run.store.folder / "adapter" / "adapter_model.safetensors")
    flat = torch.cat([tensor.flatten() for _, tensor in sorted(adapter.items())])
    return run, json.loads((run.store.folder / "report.json").read_text()), flat


@pytest.fixture(scope="module")
def narrow(config: FedConfig, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run in bfloat16 that was stopped after its first round, and opened again."""
    run = begun(config, tmp_path_factory.mktemp("runs") / "narrow", "bfloat16")
    with pytest.raises(KeyboardInterrupt):
        simulated(run, StopAfter(1))
    return simulated(replace(Run.open(run.store.folder), config=run.config), PlainDisplay())


def test_bfloat16_gives_the_report_and_the_adapter_of_float32_but_for_rounding(
    config: FedConfig, narrow: Made, tmp_path: Path
) -> None:
    _, right, wide = simulated(begun(config, tmp_path / "wide", "float32"), PlainDisplay())
    _, found, adapter = narrow
    assert adapter.dtype == torch.float32
    assert not torch.equal(adapter, wide)
    assert float(torch.cosine_similarity(adapter, wide, dim=0)) > 0.99
    for kind in ("public", "private"):
        for name, score in right["quality"][kind].items():
            assert found["quality"][kind][name]["loss"] == pytest.approx(score["loss"], rel=1e-2), (kind, name)
    assert found["emulator"]["gradient_cosine"] == pytest.approx(right["emulator"]["gradient_cosine"], abs=0.02)


@pytest.mark.parametrize("weights", ["widened", "stored"])
def test_a_site_keeps_its_frozen_weights_in_bfloat16_and_its_adapter_in_float32(narrow: Made, weights: str) -> None:
    """In both forms of frozen weights the emulator is the same to the last bit."""
    run = narrow[0]
    manifest = run.store.job()
    assert manifest is not None
    simulated_site = next(iter(simulated_sessions(run, manifest).values()))
    limits = VettingThresholds.for_owner(2 * manifest.adapter.rank, share=1e6)
    place = {"emulator": manifest.emulator, "limits": limits, "seed": 1}
    site = open_session(run.store.package, manifest, weights=weights, dtype="bfloat16", **place)
    assert dtype_of(site.model) == torch.bfloat16
    assert {parameter.dtype for parameter in trainable(site.model).values()} == {torch.float32}
    batch = site.task.dummy_batch(site.model, manifest.length, seed=1)
    losses = [session.task.losses(session.model, batch) for session in (site, simulated_site)]
    assert torch.equal(*losses)
