"""Every compressor, and a mix of four of them, builds the same emulator on another device."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.package.package_reader import load
from offsite.emulator.structure.geometry import Geometry
from offsite.task.device import device_of
from tests.contracts.test_compressors import CASES, CONFIGS, IDS, MIXES
from tests.fake_device import fake_device


def calibrate(model: torch.nn.Module) -> None:
    for ids in IDS.split(2):
        model(input_ids=ids.to(device_of(model)))


def losses(model: torch.nn.Module) -> object:
    for ids in IDS.split(2):
        own = ids.to(device_of(model))
        yield model(input_ids=own, labels=own).loss / 2


def write(model: torch.nn.Module, recipe: tuple[str, ...], folder: Path) -> None:
    design = EmulatorDesign(Geometry.of(model, 2, 2), recipe, "verbatim")
    write_package(model, design, Calibration(calibrate, losses), folder)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.bfloat16)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("recipe", [*(case.recipe for case in CASES.values()), MIXES[3]], ids="+".join)
def test_the_package_is_the_same(model: torch.nn.Module, recipe: tuple[str, ...], tmp_path: Path) -> None:
    """A product may be rounded otherwise, so that a code next to a tie may be its neighbour."""
    write(copy.deepcopy(model), recipe, tmp_path / "cpu")
    with fake_device() as device:
        write(copy.deepcopy(model).to(device), recipe, tmp_path / "other")
        calibrate(load(tmp_path / "other", dtype=torch.float32).to(device))
    expected, found = (dict(load(tmp_path / name, dtype=torch.float32).state_dict()) for name in ("cpu", "other"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 0.05 * tensor.norm(), name
