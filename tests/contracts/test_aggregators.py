"""Every server rule: pure, in the update's direction at first, and equal to torch's optimizer."""

import numpy as np
import pytest
import torch

from coordinator.aggregate import AGGREGATORS, Rates, ServerState

RATES = Rates(learning_rate=0.1, momentum=0.9)
TORCH = {
    "fedadam": lambda p: torch.optim.Adam([p], lr=0.1, betas=(0.9, 0.999), eps=1e-12),
    "fedavgm": lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9),
    "mean": lambda p: torch.optim.SGD([p], lr=1.0),
}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_rule_is_pure_and_starts_in_the_updates_direction(name: str) -> None:
    update = np.random.default_rng(0).normal(size=50)
    start = ServerState.start(np.ones(50, dtype=np.float32))
    once, twice = (AGGREGATORS[name](start, update.copy(), RATES) for _ in range(2))
    np.testing.assert_array_equal(once.adapter, twice.adapter)
    np.testing.assert_array_equal(start.adapter, np.ones(50))
    assert once.adapter.dtype == np.float32
    assert once.rounds == 1
    assert np.all(np.sign(once.adapter - 1) == np.sign(update))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_zero_update_moves_nothing(name: str) -> None:
    start = ServerState.start(np.ones(5, dtype=np.float32))
    np.testing.assert_array_equal(AGGREGATORS[name](start, np.zeros(5), RATES).adapter, start.adapter)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_rule_is_torchs_optimizer_on_minus_the_update(name: str) -> None:
    assert set(TORCH) == set(AGGREGATORS)
    draw = np.random.default_rng(1)
    state = ServerState.start(draw.normal(size=20).astype(np.float32))
    parameter = torch.nn.Parameter(torch.from_numpy(state.adapter.astype(np.float64)))
    optimizer = TORCH[name](parameter)
    for _ in range(5):
        update = draw.normal(size=20) * 1e-3
        state = AGGREGATORS[name](state, update, RATES)
        parameter.grad = torch.from_numpy(-update)
        optimizer.step()
    np.testing.assert_allclose(state.adapter, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
