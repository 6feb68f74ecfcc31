"""Shares of a step: the sum over processes is the sum of one process, and a fault at one of them is heard."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from offsite.errors import TrainingFault
from offsite.privacy import zero_order
from offsite.privacy.engines import ENGINES
from offsite.privacy.mechanism import DpSgdConfig, DpTraining, gradient_shares, train
from offsite.privacy.shares import Compute, Share, parameter_state
from offsite.secagg import ring
from tests.contracts.test_engines import CASES, HOOKED, TASK, adapted, ragged
from tests.privacy.test_faults import BROKEN, SHORT, failing, short_of_memory
from tests.privacy.test_mechanism import data, losses, network, run, silent, terms
from tests.privacy.test_zero_order import Point, curved, looking
from tests.privacy.test_zero_order import data as points
from tests.privacy.test_zero_order import silent as still
from tests.privacy.test_zero_order import terms as slopes

METHODS = ("lora on llama", "norms of gpt2", "bottleneck", "scales", "changes of llama")


class Beside:
    """A worker without a process: its own model, and everything that reaches it as bytes."""

    def __init__(self, compute: Compute) -> None:
        self._compute, self._sent = compute, b""

    def send(self, state: Any, records: Any) -> None:
        self._sent = pickle.dumps((state, records))

    def receive(self) -> Share:
        share: Share = pickle.loads(pickle.dumps(self._compute(*pickle.loads(self._sent))))
        return share


@contextmanager
def beside(count: int, opened: Callable[[], AbstractContextManager[Compute]]) -> Iterator[list[Beside]]:
    with ExitStack() as stack:
        yield [Beside(stack.enter_context(opened())) for _ in range(count)]


def summed(case: str, plan: DpSgdConfig, processes: int) -> np.ndarray:
    """Returns the clipped sum of five records over so many models, float64 (d,)."""
    total, batch = [], ragged()
    for part in np.array_split(np.arange(5), processes):
        model = adapted(case)
        with gradient_shares(model, TASK.losses, plan, None) as compute:
            share = compute(parameter_state(adapted(case)), batch.select(part))
        assert len(share.counted.losses) == len(part)
        total.append(np.concatenate([array.reshape(-1) for array in share.arrays]))
    return np.sum(total, axis=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", METHODS)
def test_the_sum_is_one_process_sum_to_a_step_of_the_ring(case: str, engine: str) -> None:
    has_no_rule = {"hooks": CASES.keys() - HOOKED, "bookkeeping": {"scales", "shards", "biases"}}
    if case in has_no_rule.get(engine, ()):
        pytest.skip("the engine has no rule for this method")
    plan = DpSgdConfig(1.0, 1.0, 1.0, 5, 1, 1.0, physical_batch=4, engine=engine)
    one, two = (summed(case, plan, processes) for processes in (1, 2))
    step = 1 / ring.scale(8.0 * 5, 4)  # of an update of one step with the usual bound, in the units of the sum
    assert np.abs(one).max() > 1e5 * step
    assert np.abs(two - one).max() <= step


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_training_with_workers_is_the_training_without(engine: str, private: bool) -> None:
    """Noise and draws are those of one process, whose number of records rarely divides by three."""
    plan = terms(engine=engine, steps=4, private=private, noise_multiplier=1.0 if private else None)
    expected, alone = run(data(), plan, silent())
    model = network()
    with beside(2, lambda: gradient_shares(network(), losses, plan, data(1))) as workers:
        outcome = train(DpTraining(model, losses, data(), plan, silent(), data(1), workers))
    moved = torch.cat([p.detach().flatten() for p in model[2].parameters()])
    before = torch.cat([p.detach().flatten() for p in network()[2].parameters()])
    torch.testing.assert_close(moved - before, expected, rtol=0, atol=2e-7)
    assert (outcome.batch_sizes, outcome.dropped) == (alone.batch_sizes, 0)
    assert outcome.clipped_fraction == alone.clipped_fraction
    assert (outcome.clipped_fraction > 0) == private
    np.testing.assert_allclose(outcome.losses, alone.losses, rtol=1e-5)


def test_slopes_with_workers_are_those_without_bit_for_bit() -> None:
    rows, plan, along = points(), slopes(), looking()
    alone, expected = zero_order.train(zero_order.DpTraining(Point(), curved, rows, plan, still()), along)
    with beside(2, lambda: zero_order.slope_shares(Point(), curved, along, None)) as workers:
        training = DpTraining(Point(), curved, rows, plan, still(), None, workers)
        outcome, moved = zero_order.train(training, along)
    np.testing.assert_array_equal(moved, expected)
    assert outcome == alone


def beside_one(model: nn.Module, failing_with: Any, plan: DpSgdConfig) -> AbstractContextManager[list[Beside]]:
    return beside(1, lambda: gradient_shares(model, failing_with, plan, data(1)))


def test_short_memory_at_one_process_makes_its_batches_smaller() -> None:
    plan = terms(physical_batch=8, sample_rate=1.0)
    model, short = network(), short_of_memory(1, 2, SHORT[1])
    with beside_one(short, losses, plan) as workers:
        outcome = train(DpTraining(model, losses, data(12), plan, silent(), data(1), workers))
    expected, _ = run(data(12), plan, silent())
    moved = torch.cat([p.detach().flatten() for p in model[2].parameters()])
    before = torch.cat([p.detach().flatten() for p in network()[2].parameters()])
    torch.testing.assert_close(moved - before, expected, rtol=0, atol=2e-7)
    assert outcome.dropped == 0


@pytest.mark.parametrize("error", [SHORT[1], *BROKEN], ids=str)
def test_a_fault_at_one_process_ends_the_training(error: Exception) -> None:
    plan = terms(sample_rate=1.0)
    with beside_one(network(), failing(error), plan) as workers:
        training = DpTraining(network(), losses, data(12), plan, silent(), data(1), workers)
        with pytest.raises(MemoryError if error is SHORT[1] else TrainingFault):
            train(training)


def test_a_record_that_fails_at_a_worker_is_left_out_unheard() -> None:
    plan, rows = terms(sample_rate=1.0), data(12)
    rows.values[9] = torch.nan
    rest = copy.deepcopy(rows)
    rest.values = rows.values[[row for row in range(12) if row != 9]]
    expected, _ = run(rest, plan, silent())
    model = network()
    with beside_one(network(), losses, plan) as workers:
        outcome = train(DpTraining(model, losses, rows, plan, silent(), data(1), workers))
    moved = torch.cat([p.detach().flatten() for p in model[2].parameters()])
    before = torch.cat([p.detach().flatten() for p in network()[2].parameters()])
    torch.testing.assert_close(moved - before, expected, rtol=0, atol=2e-7)
    assert outcome.dropped == 1
