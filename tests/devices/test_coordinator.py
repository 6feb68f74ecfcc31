"""The coordinator's whole way on another device: load, build, gate, clip, rounds, refresh, plug-in, scores, adapter."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from offsite.cli.display import PlainDisplay
from offsite.coordinator.config.compute_table import ComputeConfig
from offsite.coordinator.config.federation_file import FedConfig, read_config
from offsite.simulation.memory_engine import memory_engine
from offsite.simulation.run_folder import Run, with_options
from offsite.simulation.simulate import Options, simulate
from tests.fake_device import DEVICE, fake_device


def simulated(config: FedConfig, folder: Path, compute: ComputeConfig) -> tuple[Any, dict[str, Any]]:
    """Returns the report and the adapter of a simulation on a device."""
    run = Run.create(replace(config, compute=compute), "0" * 64, folder)
    simulate(run, Options(memory_engine, "memory", PlainDisplay(), "2026-01-01T00:00:00+00:00"))
    return json.loads((folder / "report.json").read_text()), load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(("refresh", "offload"), [(0, "always"), (1, "auto"), (1, "always")])
def test_a_simulation_gives_the_same_report_and_adapter(fed: Path, tmp_path: Path, refresh: int, offload: str) -> None:
    config = with_options(read_config(fed)[0], seed=None, rounds=1 + refresh, sites=3)
    compress = (*config.emulator.compress, *(["center"] if refresh else []))
    config = replace(config, emulator=replace(config.emulator, refresh=refresh, compress=compress))
    expected, adapter = simulated(config, tmp_path / "cpu", ComputeConfig("cpu"))
    with fake_device():
        found, moved = simulated(config, tmp_path / "other", ComputeConfig(DEVICE, offload=offload))
    assert moved.keys() == adapter.keys()
    for name, tensor in adapter.items():
        assert (moved[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max() + 1e-6, name
    for kind in ("public", "private"):
        for name, score in expected["quality"][kind].items():
            assert found["quality"][kind][name]["loss"] == pytest.approx(score["loss"], rel=1e-4), (kind, name)
