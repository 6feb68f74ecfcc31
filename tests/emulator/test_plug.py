"""Plug-in is the identity on names, and a worse adapter is not taken over."""

import copy

import numpy as np
import pytest
import torch

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.package.package_reader import load
from offsite.emulator.runtime.plug_in import accept, plug
from offsite.emulator.structure.geometry import Geometry
from offsite.errors import ConfigError, DigestMismatch, RangeError


@pytest.fixture
def spec(llama):
    return AdapterSpec(slots=Geometry.of(llama.model, 2, 1).slots(llama.model))


def test_plugged_in_equals_written_by_name(llama, spec, tmp_path):
    geometry = Geometry.of(llama.model, 2, 1)
    write_package(
        llama.model, EmulatorDesign(geometry, ("skip_uniform:1",), "int8"), Calibration(llama.calibrate), tmp_path / "p"
    )
    emulator = attach(load(tmp_path / "p"), spec)
    full = attach(copy.deepcopy(llama.model), spec)
    vector = np.random.default_rng(0).normal(size=Layout.of(emulator).size).astype(np.float32)
    by_name = copy.deepcopy(full)
    values = Layout.of(emulator).named(vector)
    with torch.no_grad():
        for name, parameter in by_name.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.from_numpy(values.pop(name)))
    assert values == {}
    assert plug(full, Layout.of(emulator), vector) is full
    assert torch.equal(llama.run(full), llama.run(by_name))
    assert not torch.equal(llama.run(full), llama.run(llama.model))


def test_another_layout_or_vector_is_refused(llama, spec):
    full = attach(llama.model, spec)
    layout = Layout.of(full)
    with pytest.raises(DigestMismatch, match="attach the adapter of the same spec"):
        plug(full, Layout(layout.names[1:], layout.shapes[1:]), np.zeros(layout.size))
    for bad in (np.zeros(layout.size + 1), np.full(layout.size, np.nan)):
        with pytest.raises(RangeError):
            plug(full, layout, bad)


@pytest.mark.parametrize(
    ("new", "tolerance", "accepted"),
    [
        (2.9, 0, True),
        (3.0, 0, True),
        (3.01, 0, False),
        (3.01, 0.02, True),
        (float("nan"), 1, False),
        (float("inf"), 1, False),
    ],
)
def test_acceptance(new, tolerance, accepted):
    verdict = accept(3.0, new, tolerance)
    assert verdict.accepted is accepted
    assert verdict.reason.startswith("taken over" if accepted else "not taken over")
    assert "3.0000" in verdict.reason


@pytest.mark.parametrize(
    ("previous", "tolerance"), [(float("nan"), 0), (float("inf"), 0), (3, -0.1), (3, float("nan"))]
)
def test_acceptance_needs_numbers(previous, tolerance):
    with pytest.raises(ConfigError, match="previous_loss="):
        accept(previous, 3.0, tolerance)
