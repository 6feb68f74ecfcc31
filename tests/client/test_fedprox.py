"""FedProx as a hook: bit for bit the training that is stopped after each step, pulled back by hand and begun again."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offsite.client.training.fedprox import proximal_pull
from offsite.errors import PrivacyRefusal
from offsite.privacy.engines import ENGINES
from offsite.privacy.mechanism import DpSgdConfig, DpTraining, Outcome, train
from offsite.privacy.randomness import Randomness

MU = 0.7
TERMS = DpSgdConfig(
    noise_multiplier=1.1,
    max_grad_norm=0.3,
    sample_rate=0.25,
    expected_batch_size=10,
    steps=6,
    learning_rate=0.37,
    physical_batch=4,
)


class Rows:
    """Records as rows of numbers."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def select(self, indices: Any) -> "Rows":
        return Rows(self.values[torch.as_tensor(indices, dtype=torch.long)])


def network() -> nn.Module:
    """A network of which two layers train and one is frozen."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    return model


def losses(model: nn.Module, rows: Rows) -> Tensor:
    return model(rows.values).square().sum(1)


def training(terms: DpSgdConfig, randomness: Randomness) -> DpTraining:
    values = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    values[::5] = math.nan  # records without a finite loss are left out in both
    return DpTraining(network(), losses, Rows(values), terms, randomness)


def by_hand(whole: DpTraining, mu: float) -> list[Outcome]:
    """Six trainings of one step each, with mu (w - w_start) taken off after each noisy step."""
    parameters = [parameter for parameter in whole.model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in parameters]
    outcomes = []
    for _ in range(whole.terms.steps):
        before = [parameter.detach().clone() for parameter in parameters]
        outcomes.append(train(dataclasses.replace(whole, terms=dataclasses.replace(whole.terms, steps=1))))
        with torch.no_grad():
            for parameter, here, home in zip(parameters, before, start, strict=True):
                parameter.sub_(whole.terms.learning_rate * mu * (here - home))
    return outcomes


def trained(whole: DpTraining) -> list[Tensor]:
    return [parameter.detach() for parameter in whole.model.parameters()]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("private", [True, False])
def test_the_hook_is_the_training_that_begins_again_after_each_step(engine: str, private: bool) -> None:
    terms = dataclasses.replace(TERMS, engine=engine, private=private, noise_multiplier=1.1 if private else None)
    hooked, slow = (training(terms, Randomness.for_simulation(5, "noise")) for _ in range(2))
    outcome = train(hooked, proximal_pull(hooked, MU))
    steps = by_hand(slow, MU)
    for ours, theirs in zip(trained(hooked), trained(slow), strict=True):
        assert torch.equal(ours, theirs)
    assert outcome.losses == tuple(loss for step in steps for loss in step.losses)
    assert outcome.batch_sizes == tuple(size for step in steps for size in step.batch_sizes)
    assert outcome.dropped == sum(step.dropped for step in steps) > 0
    assert outcome.event == (terms.event() if private else None)
    shares = [step.clipped_fraction * (step.batch_sizes[0] - step.dropped) for step in steps]
    assert outcome.clipped_fraction == pytest.approx(sum(shares) / (sum(outcome.batch_sizes) - outcome.dropped))
    assert min(step.norm_median for step in steps) <= outcome.norm_median <= max(step.norm_median for step in steps)


def test_a_pull_draws_nothing_and_moves_the_adapter() -> None:
    """Free and pulled trainings meet the same batches; the second step is the first that the pull can change."""
    free, pulled, single = (
        training(dataclasses.replace(TERMS, steps=steps), Randomness.for_simulation(5, "noise")) for steps in (6, 6, 1)
    )
    outcomes = train(free), train(pulled, proximal_pull(pulled, MU))
    assert outcomes[0].batch_sizes == outcomes[1].batch_sizes
    assert outcomes[0].event == outcomes[1].event
    assert any(not torch.equal(a, b) for a, b in zip(trained(free), trained(pulled), strict=True))
    without = training(dataclasses.replace(TERMS, steps=1), Randomness.for_simulation(5, "noise"))
    train(single, proximal_pull(single, MU))
    train(without)
    assert all(torch.equal(a, b) for a, b in zip(trained(single), trained(without), strict=True))


def test_a_pull_of_another_strength_is_another_training() -> None:
    """The comparison above can fail."""
    hooked, slow = (training(TERMS, Randomness.for_simulation(5, "noise")) for _ in range(2))
    train(hooked, proximal_pull(hooked, MU))
    by_hand(slow, np.nextafter(MU, 1) + 1e-3)
    assert any(not torch.equal(a, b) for a, b in zip(trained(hooked), trained(slow), strict=True))


def test_nothing_to_pull_is_refused() -> None:
    whole = training(TERMS, Randomness.for_simulation(5, "noise"))
    whole.model.requires_grad_(False)
    with pytest.raises(PrivacyRefusal, match="trainable"):
        proximal_pull(whole, MU)
