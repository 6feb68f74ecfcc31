"""The training run against a loop written out by hand, and the noise against its plan."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from offsite.errors import ConfigError, OffsiteError, PrivacyRefusal
from offsite.privacy.clipping_bound import median_norm
from offsite.privacy.engines import ENGINES
from offsite.privacy.mechanism import DpSgdConfig, DpTraining, train
from offsite.privacy.norms import CLIP_MARGIN
from offsite.privacy.randomness import Randomness
from offsite.privacy.sampler import poisson


class Rows:
    """Rows of a matrix as examples."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def select(self, indices: Any) -> "Rows":
        return Rows(self.values[torch.as_tensor(indices, dtype=torch.long)])


def losses(model: nn.Module, rows: Rows) -> Tensor:
    return model(rows.values).square().mean(1)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    return model


def data(count: int = 40) -> Rows:
    generator = torch.Generator().manual_seed(1)
    return Rows(torch.randn(count, 5, generator=generator) * torch.linspace(0.1, 3, count)[:, None])


def terms(**changes: Any) -> DpSgdConfig:
    values = {
        "noise_multiplier": 1.0,
        "max_grad_norm": 0.3,
        "sample_rate": 0.25,
        "expected_batch_size": 10,
        "steps": 1,
        "learning_rate": 0.5,
        "physical_batch": 4,
    }
    return DpSgdConfig(**(values | changes))


def run(rows: Rows, plan: DpSgdConfig, randomness: Any, model: nn.Module | None = None) -> tuple[Tensor, Any]:
    """Returns the change of the trainable weights, flat, and the outcome."""
    model = model or network()
    before = torch.cat([p.detach().clone().flatten() for p in model[2].parameters()])
    outcome = train(DpTraining(model, losses, rows, plan, randomness))
    after = torch.cat([p.detach().flatten() for p in model[2].parameters()])
    return after - before, outcome


class NoNoise(Randomness):
    """The same batches as the parent's, and zeros for noise; exists in tests only."""

    def normal(self, count: int) -> np.ndarray:
        return np.zeros(count)


def silent(label: str = "a") -> Randomness:
    key = Randomness.for_simulation(7, label)
    return NoNoise(bytes(np.frombuffer(key._stream.update(bytes(32)), dtype=np.uint8)), seeded=True)


def by_hand(rows: Rows, indices: np.ndarray, bound: float | None) -> Tensor:
    """Returns the sum of clipped gradients, one example at a time, float64."""
    model = network().double()
    total = torch.zeros(8 * 3 + 3, dtype=torch.float64)
    for index in indices:
        gradients = torch.autograd.grad(
            losses(model, Rows(rows.values[int(index)][None].double())).sum(), list(model[2].parameters())
        )
        flat = torch.cat([g.flatten() for g in gradients])
        total += flat if bound is None else flat * min(1.0, bound * (1 - CLIP_MARGIN) / float(flat.norm()))
    return total


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("physical", [1, 4, 64])
def test_a_step_is_the_clipped_mean_over_the_expected_batch(engine: str, physical: int) -> None:
    rows = data()
    moved, outcome = run(rows, terms(engine=engine, physical_batch=physical), silent())
    indices = poisson(len(rows), 0.25, silent())
    assert outcome.batch_sizes == (len(indices),)
    expected = -0.5 * by_hand(rows, indices, 0.3) / 10
    assert float((moved - expected).norm() / expected.norm()) < 1e-5
    assert 0 < outcome.clipped_fraction < 1


@pytest.mark.parametrize("engine", ENGINES)
def test_without_privacy_nothing_is_clipped_and_no_event_is_claimed(engine: str) -> None:
    rows = data()
    moved, outcome = run(rows, terms(engine=engine, private=False, noise_multiplier=0.0), silent())
    expected = -0.5 * by_hand(rows, poisson(len(rows), 0.25, silent()), None) / 10
    assert float((moved - expected).norm() / expected.norm()) < 1e-5
    assert outcome.event is None


@pytest.mark.parametrize("engine", ENGINES)
def test_leaving_one_example_out_moves_the_sum_by_at_most_the_bound(engine: str) -> None:
    """Sensitivity by brute force: every example of a full batch, at several bounds."""
    rows = data(12)
    for bound in (0.01, 0.3, 5.0):
        plan = terms(engine=engine, sample_rate=1.0, max_grad_norm=bound, learning_rate=1.0)
        whole, _ = run(rows, plan, silent())
        for left_out in range(len(rows)):
            rest = rows.select([i for i in range(len(rows)) if i != left_out])
            without, _ = run(rest, plan, silent())
            assert 10 * float((whole.double() - without.double()).norm()) <= bound * (1 + 1e-5) + 2e-6


@pytest.mark.statistical
@pytest.mark.parametrize("rate", [1e-9, 0.25])
def test_noise_has_the_planned_scale_and_no_other(rate: float) -> None:
    """At rate 1e-9 the batch is empty and the step is noise alone; otherwise the noiseless step is subtracted first."""
    rows = data()
    draws = []
    for label in range(60):
        stream = Randomness.for_simulation(label, "noise")
        moved, outcome = run(rows, terms(noise_multiplier=2.0, sample_rate=rate, learning_rate=1.0), stream)
        still = by_hand(rows, poisson(len(rows), rate, Randomness.for_simulation(label, "noise")), 0.3) / 10
        draws.append((moved.double() + still).numpy())
        assert (outcome.batch_sizes == (0,)) == (rate < 1e-3)
    noise = np.concatenate(draws) / (2.0 * 0.3 / 10)
    assert stats.kstest(noise, "norm").pvalue > 0.01
    for wrong in (0.8, 1.25):
        assert stats.kstest(noise, stats.norm(scale=wrong).cdf).pvalue < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_poisoned_example_leaves_no_trace(engine: str, poison: float) -> None:
    rows = data(12)
    plan = terms(engine=engine, sample_rate=1.0)
    clean, _ = run(rows, plan, silent())
    poisoned = Rows(torch.cat([rows.values, torch.full((1, 5), poison)]))
    moved, outcome = run(poisoned, plan, silent())
    assert torch.isfinite(moved).all()
    if np.isfinite(poison):  # tanh saturates: a huge input is an ordinary, clipped example
        assert 10 * float((moved - clean).norm()) / 0.5 <= 0.3 * (1 + 1e-5)
    else:
        assert outcome.dropped == 1
        torch.testing.assert_close(moved, clean, rtol=1e-6, atol=1e-8)


class Touchy(nn.Module):
    """Fails in the forward or backward pass when a record has a value above 50."""

    def __init__(self, backward: bool) -> None:
        super().__init__()
        self.backward = backward

    def forward(self, values: Tensor) -> Tensor:
        if bool((values > 50).any()):
            if not self.backward:
                raise RuntimeError("Mr Smith")
            values = values.clone().requires_grad_(True)
            values.register_hook(_raise)
        return values


def _raise(_: Tensor) -> None:
    raise IndexError("Mr Smith")


@pytest.mark.parametrize(("engine", "backward"), [("hooks", False), ("hooks", True), ("loop", False)])
def test_an_example_on_which_the_model_fails_leaves_no_trace(engine: str, backward: bool) -> None:
    """Its neighbours in the batch stay: the sum is that of all others, and the training ends like any other."""
    rows, plan = data(12), terms(engine=engine, sample_rate=1.0)

    def touchy() -> nn.Module:
        model = network()
        return nn.Sequential(nn.Sequential(Touchy(backward), model[0]), model[1], model[2])

    clean, _ = run(rows, plan, silent(), touchy())
    bad = Rows(torch.cat([rows.values[:5], torch.full((1, 5), 99.0), rows.values[5:]]))
    moved, outcome = run(bad, plan, silent(), touchy())
    assert outcome.dropped == 1
    torch.testing.assert_close(moved, clean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_failing_example_and_an_empty_one_leave_the_others_the_same_bits(engine: str) -> None:
    """Another example stands in its place, so that the batch keeps the shape by which products are rounded."""
    plan, values = terms(engine=engine, sample_rate=1.0, physical_batch=8), data(12).values

    def moved(value: float) -> tuple[Tensor, Any]:
        rows, model = values.clone(), network()
        rows[5] = value
        return run(
            Rows(rows), plan, silent(), nn.Sequential(nn.Sequential(Touchy(False), model[0]), model[1], model[2])
        )

    (failed, outcome), (missing, _) = moved(99.0), moved(float("nan"))
    assert outcome.dropped == 1
    assert torch.equal(failed, missing)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_an_error(error: Exception) -> None:
    """No record causes the error, and a site that left all records out would send noise."""

    def fails(model: nn.Module, rows: Rows) -> Tensor:
        raise error

    with pytest.raises(MemoryError):
        train(DpTraining(network(), fails, data(4), terms(sample_rate=1.0), silent()))


def test_the_event_is_what_was_done() -> None:
    _, outcome = run(data(), terms(steps=3), Randomness.from_os())
    assert outcome.event is not None
    assert (outcome.event.noise_multiplier, outcome.event.sample_rate, outcome.event.steps) == (1.0, 0.25, 3)
    assert len(outcome.batch_sizes) == 3


def test_training_twice_leaves_no_hooks_behind() -> None:
    model = network()
    for _ in range(2):
        run(data(), terms(), Randomness.from_os(), model)
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(not hasattr(p, "grad_sample") for p in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": 0.01},
        {"noise_multiplier": 1.1e9},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": 7e-44, "learning_rate": 1e38},
        {"max_grad_norm": 9e-10},
        {"max_grad_norm": 1.1e9},
        {"max_grad_norm": float("nan")},
        {"max_grad_norm": 10**400},
        {"expected_batch_size": 0},
        {"expected_batch_size": 1.1e9},
        {"learning_rate": -1.0},
        {"learning_rate": 9e-10},
        {"learning_rate": 1.1e9},
        {"physical_batch": 0},
        {"physical_batch": -1},
        {"physical_batch": 1025},
    ],
)
def test_terms_that_void_the_promise_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(OffsiteError):
        terms(**changes)
    if changes == {"noise_multiplier": 0.01}:
        with pytest.raises(PrivacyRefusal):
            terms(**changes)


@pytest.mark.parametrize("clip", [1e-9, 1e9])
@pytest.mark.parametrize("rate", [1e-9, 1e9])
def test_terms_at_the_ends_of_their_ranges_are_taken(clip: float, rate: float) -> None:
    assert terms(max_grad_norm=clip, learning_rate=rate, physical_batch=1024).max_grad_norm == clip


def test_a_model_without_an_adapter_is_refused() -> None:
    model = network().requires_grad_(False)
    with pytest.raises(PrivacyRefusal, match="trainable parameters=0"):
        train(DpTraining(model, losses, data(), terms(), silent()))


@pytest.mark.parametrize(("scale", "reason"), [(0.0, "must be > 0"), (1e-20, "from 1e-09"), (1e20, "to 1e.09")])
def test_a_clip_that_no_plan_can_have_is_refused_where_it_is_measured(scale: float, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"median gradient norm=.* {reason}"):
        median_norm(network(), lambda model, rows: losses(model, rows) * scale, [data(4)])
