"""Every task, with every per-example engine, on another device than the CPU: the same numbers, and no mixing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offsite.errors import PrivacyRefusal
from offsite.privacy import zero_order
from offsite.privacy.batches import trainable
from offsite.privacy.clipping_bound import median_norm
from offsite.privacy.engines import ENGINES
from offsite.privacy.mechanism import DpSgdConfig, DpTraining, train
from offsite.privacy.probe import choose_engine
from offsite.privacy.randomness import Randomness
from offsite.privacy.zero_order import Directions
from offsite.task.tasks import TASKS
from tests.fake_device import REAL, Mixed, fake_device
from tests.task_samples import Sample, first_of

TASK_SAMPLES = [first_of(name) for name in TASKS]
each = pytest.mark.parametrize("sample", TASK_SAMPLES, ids=str)


class Opened:
    """A task with a model of which some layers train, and three examples."""

    def __init__(self, sample: Sample, folder: Path) -> None:
        self.task: Any = TASKS[sample.task]
        self.model: Any = self.task.load(sample.save(folder), dtype=torch.float32)
        processor = self.task.load_processor(folder)
        terms = {"length": sample.length, "split": "truncate", "model_config": self.model.config}
        self.batch = self.task.encode(processor, sample.records(3, 1), **terms)
        for name, module in self.model.named_modules():
            if name.endswith(sample.targets) and hasattr(module, "weight"):
                module.weight.requires_grad_(True)

    def on(self, device: torch.device | str) -> tuple[Any, Any]:
        """Returns a model of its own, and the examples, on a device."""
        return copy.deepcopy(self.model).to(device), self.batch.to(device)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found: dict[str, Opened] = {}

    def open_one(sample: Sample) -> Opened:
        if str(sample) not in found:
            found[str(sample)] = Opened(sample, tmp_path_factory.mktemp("model"))
        return found[str(sample)]

    return open_one


def trained(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().cpu().flatten() for parameter in trainable(model).values()])


def training(one: Opened, device: torch.device | str, engine: str) -> tuple[nn.Module, DpTraining]:
    model, batch = one.on(device)
    terms = DpSgdConfig(1.0, 0.1, 1.0, 3, 1, 0.5, physical_batch=2, engine=engine)
    randomness = Randomness.for_simulation(1, "devices")
    return model, DpTraining(model, one.task.losses, batch, terms, randomness, batch.select([0]))


@each
def test_losses_and_scores(sample: Sample, opened: Any) -> None:
    one = opened(sample)
    model, batch = one.on("cpu")
    expected, tally = one.task.losses(model, batch).detach(), one.task.tally(model, batch)
    with fake_device() as device:
        model, batch = one.on(device)
        found = one.task.losses(model, batch)
        assert found.device == device
        torch.testing.assert_close(found.detach().cpu(), expected)
        scores = one.task.tally(model, batch)
    assert (scores.loss, scores.targets) == (pytest.approx(tally.loss, rel=1e-5), tally.targets)


@pytest.mark.parametrize("engine", ENGINES)
@each
def test_a_private_training(sample: Sample, engine: str, opened: Any) -> None:
    """What an engine refuses on the CPU, it refuses here with the same words."""

    def outcome(device: torch.device | str) -> tuple[Any, ...]:
        model, given = training(opened(sample), device, engine)
        try:
            found = train(given)
        except PrivacyRefusal as refusal:
            return (str(refusal),)
        return trained(model), found.losses, found.batch_sizes, found.dropped, found.clipped_fraction

    expected = outcome("cpu")
    with fake_device() as device:
        found = outcome(device)
    assert found[2:] == expected[2:]
    if len(expected) == 1:
        assert found == expected
    else:
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
        assert found[1] == pytest.approx(expected[1], rel=1e-4, nan_ok=True)


@each
def test_probe_clip_and_forward_passes_alone(sample: Sample, opened: Any) -> None:
    one, along = opened(sample), Directions(bytes(32), 1, 1e-3)

    def measured(device: torch.device | str) -> tuple[str, float, torch.Tensor]:
        model, batch = one.on(device)
        try:
            engine = choose_engine(model, one.task.losses, one.task.dummy_batch(model, 8, seed=1).to(device))
            clip = median_norm(model, one.task.losses, [batch])
        except PrivacyRefusal as refusal:
            engine, clip = str(refusal), 0.0
        _, moved = zero_order.train(training(one, device, "loop")[1], along)
        return engine, clip, torch.as_tensor(moved)

    expected = measured("cpu")
    with fake_device() as device:
        found = measured(device)
    assert found[:2] == (expected[0], pytest.approx(expected[1], rel=1e-4))
    torch.testing.assert_close(found[2], expected[2], rtol=1e-2, atol=1e-5)


def test_most_of_that_was_trained_and_not_refused(opened: Any) -> None:
    def refuses(sample: Sample) -> bool:
        try:
            train(training(opened(sample), "cpu", "loop")[1])
        except PrivacyRefusal:
            return True
        return False

    assert sum(refuses(sample) for sample in TASK_SAMPLES) <= 2


@pytest.mark.skipif(bool(REAL), reason="the refusals of a real device are its own")
def test_a_batch_that_stayed_behind_is_refused(opened: Any) -> None:
    """The device itself: without its refusals all tests of this folder would prove nothing."""
    one = opened(first_of("causal_lm"))
    with fake_device() as device:
        model, _ = one.on(device)
        with pytest.raises(Mixed):
            model(input_ids=one.batch.input_ids)
        assert one.task.losses(model, one.batch).device == device  # a task takes its batch along
        with pytest.raises(Mixed):
            torch.ones(3, device=device) + torch.ones(3)
        with pytest.raises(TypeError, match="can't convert"):
            torch.ones(3, device=device).numpy()
