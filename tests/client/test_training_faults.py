"""What a site answers when its machine fails in the middle of a training, wherever in the emulator that happens."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offsite.client.home.redact import FAULT, NO_MEMORY, REFUSALS
from offsite.client.training.local_update import SiteJob, Trained, local_update
from offsite.client.training.privacy_plan import plan_for
from offsite.privacy.randomness import Randomness
from offsite.protos import codec
from tests.memory_federation import RunningSite, World, make_world
from tests.privacy.test_faults import BROKEN, SHORT


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(fed, tmp_path_factory.mktemp("training_faults"))


@contextmanager
def failing(module: torch.nn.Module, error: Exception, most: int = 0) -> Iterator[None]:
    """Lets a module fail on more than `most` records at once."""

    def fail(_: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = [value for value in (*inputs, *named.values()) if isinstance(value, torch.Tensor)]
        if not tensors or max(len(value) for value in tensors if value.ndim) > most:
            raise error

    handle = module.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def trained(world: World, seed: int = 1) -> Trained:
    site = world.run.config.sites[0]
    examples = world.run.examples(site.train, world.manifest, world.session)
    job = SiteJob(site.name, world.manifest, world.session, examples, plan_for(world.manifest, len(examples)))
    return local_update(job, world.start, randomness=Randomness.for_simulation(seed, "faults"))


def called(world: World) -> list[str]:
    """Returns the paths of the modules that a training calls."""
    names = list[str]()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: names.append(name))
        for name, module in world.session.model.named_modules()
    ]
    trained(world)
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(names))


def test_short_memory_at_any_module_makes_batches_smaller(world: World) -> None:
    """The update is the same to rounding, and no record is left out."""
    whole = trained(world)
    assert len(called(world)) > 20
    for name in called(world):
        with failing(world.session.model.get_submodule(name), torch.OutOfMemoryError("CUDA out of memory."), most=2):
            small = trained(world)
        assert small.outcome.dropped == 0
        np.testing.assert_allclose(small.update, whole.update, rtol=0, atol=1e-5 * np.abs(whole.update).max())


@pytest.mark.parametrize("error", [*SHORT, *BROKEN], ids=str)
def test_a_machine_that_fails_is_answered_with_a_constant_sentence(
    world: World, tmp_path: Path, error: Exception
) -> None:
    site = RunningSite(world, "ash", tmp_path / "ash", package=world.run.store.package)
    site.ready()
    kind, reason = (FAULT, NO_MEMORY) if error in SHORT else ("TrainingFault", REFUSALS["TrainingFault"])
    for name in called(world)[::7]:
        with failing(world.session.model.get_submodule(name), error):
            answer = site.ask("train", codec.TrainRequest(world.manifest.digest(), 1, world.start))
        assert answer == codec.Refusal(kind, reason), name
    answer = site.ask("train", codec.TrainRequest(world.manifest.digest(), 1, world.start))
    assert isinstance(answer, codec.TrainReply)
