"""The cost of a job, measured on invented records: nothing stays changed, short memory is refused with a number."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from offsite.client.training.estimate import estimate
from offsite.errors import TrainingFault
from offsite.task.device_memory import free_memory, peak_of
from tests.client.test_training_faults import failing
from tests.memory_federation import World, make_world

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(fed, tmp_path_factory.mktemp("estimate"))


def test_a_measured_job_leaves_the_session_as_it_was(world: World) -> None:
    session, manifest = world.sessions["ash"], world.manifest
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    cost = estimate(session, manifest, "ash")
    assert all(torch.equal(value, before[name]) for name, value in session.model.state_dict().items())
    assert np.array_equal(session.layout.read(session.model), session.start)
    assert (cost.engine, cost.device) == (session.engine, "cpu")
    assert cost.batch == min(manifest.physical_batch, int(manifest.privacy.batch))
    steps = manifest.local_steps * (cost.step_seconds + manifest.privacy.batch * cost.record_seconds)
    assert cost.round_seconds == pytest.approx(steps)
    assert cost.job_seconds == pytest.approx(manifest.rounds * steps)
    assert cost.peak_bytes > 50 * 2**20  # of a whole process with PyTorch in it
    assert re.search(r"a round trains for about .*, the job for about .*; peak memory \d+\.\d\d GiB", cost.line())


def test_a_batch_that_does_not_fit_is_measured_smaller(world: World) -> None:
    session = world.sessions["ash"]
    module = session.model.get_submodule(
        next(name for name, _ in session.model.named_modules() if name.endswith("mlp"))
    )
    with failing(module, torch.OutOfMemoryError("CUDA out of memory."), most=2):
        assert estimate(session, world.manifest, "ash").round_seconds > 0


@pytest.mark.parametrize(
    ("words", "least"),
    [
        ("CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has a total capacity of 2.00 GiB", 3.5),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes.", 8.0),
    ],
)
def test_a_device_that_cannot_hold_one_record_is_refused_with_the_number(
    world: World, words: str, least: float
) -> None:
    session = world.sessions["ash"]
    with (
        failing(session.model, RuntimeError(words)),
        pytest.raises(TrainingFault, match="weights = 'stored'") as refused,
    ):
        estimate(session, world.manifest, "ash")
    needed = re.search(r"needs (\d+\.\d\d) GiB", str(refused.value))
    assert needed is not None
    assert least < float(needed[1]) < least + 8
    assert np.array_equal(session.layout.read(session.model), session.start)


def test_a_machine_that_fails_is_refused_before_a_record_is_read(world: World) -> None:
    session = world.sessions["ash"]
    module = session.model.get_submodule(
        next(name for name, _ in session.model.named_modules() if name.endswith("mlp"))
    )
    estimate(session, world.manifest, "ash")
    with failing(module, RuntimeError("no kernel image")), pytest.raises(TrainingFault, match="no kernel image"):
        estimate(session, world.manifest, "ash")


def test_the_peak_of_the_process_follows_what_is_held() -> None:
    with peak_of(CPU) as small:
        pass
    with peak_of(CPU) as large:
        torch.ones(2**26)
    assert 0.9 * 2**28 < large.bytes - small.bytes < 1.5 * 2**28
    assert 0 < free_memory(CPU) < 2**50
