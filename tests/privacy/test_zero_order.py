"""Training by forward passes alone: slopes against closed forms, the bound by leaving one out, and the replay."""

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from offsite.adapter.layout import Layout
from offsite.errors import ConfigError, PrivacyRefusal
from offsite.privacy.mechanism import DpSgdConfig, DpTraining
from offsite.privacy.norms import CLIP_MARGIN
from offsite.privacy.randomness import Randomness
from offsite.privacy.sampler import poisson
from offsite.privacy.zero_order import Directions, median_slope, replay, train

SIZE = 6


class Rows:
    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def select(self, indices: Any) -> "Rows":
        return Rows(self.values[torch.as_tensor(indices, dtype=torch.long)])


class Point(nn.Module):
    """A model that is nothing but its adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.linspace(-0.5, 0.5, SIZE))


def linear(model: Any, rows: Rows) -> Tensor:
    """Returns the loss x w of record x at w, whose slope along z is x z everywhere."""
    return (rows.values.double() @ model.at.double()).double()


def curved(model: Any, rows: Rows) -> Tensor:
    return (rows.values.double() - model.at.double()).square().sum(1)


def data(count: int = 30) -> Rows:
    generator = torch.Generator().manual_seed(1)
    return Rows(torch.randn(count, SIZE, generator=generator) * torch.linspace(0.1, 3, count)[:, None])


def looking(per_step: int = 4, spacing: float = 0.25, name: str = "a") -> Directions:
    return Directions(hashlib.sha256(name.encode()).digest(), per_step, spacing)


def terms(**changes: Any) -> DpSgdConfig:
    values = {
        "noise_multiplier": 1.0,
        "max_grad_norm": 2.0,
        "sample_rate": 0.3,
        "expected_batch_size": 10,
        "steps": 3,
        "learning_rate": 0.1,
    }
    return DpSgdConfig(**(values | changes))


class NoNoise(Randomness):
    """The same batches, and zeros for noise; exists in tests only."""

    def normal(self, n: int) -> np.ndarray:
        return np.zeros(n)


def silent() -> Randomness:
    return NoNoise(bytes(32), seeded=True)


def test_directions_are_signs_that_differ_and_the_same_for_everybody() -> None:
    drawn = np.stack([looking().draw(index, 4001) for index in range(8)])
    assert set(np.unique(drawn)) == {-1.0, 1.0}
    gram = drawn @ drawn.T / 4001
    assert np.abs(gram - np.eye(8)).max() < 0.08
    # Published constants: with other bits, two releases of offsite would add up along different directions.
    assert hashlib.sha256(drawn.astype(np.int8).tobytes()).hexdigest()[:16] == "f24f7fa4c868fff6"
    assert not np.array_equal(looking(name="b").draw(0, 4001), drawn[0])


def test_a_step_is_the_clipped_mean_of_slopes() -> None:
    """For linear losses the slopes are known: a record's gradient times each direction."""
    rows, plan, along = data(), terms(steps=1), looking()
    _, moved = train(DpTraining(Point(), linear, rows, plan, silent()), along)
    drawn = poisson(len(rows), 0.3, silent())
    slopes = rows.values[drawn].double().numpy() @ np.stack([along.draw(k, SIZE) for k in range(4)]).T
    norms = np.linalg.norm(slopes, axis=1)
    assert (norms > 2).any()
    assert (norms < 2).any()
    clipped = slopes * np.minimum(1, 2.0 * (1 - CLIP_MARGIN) / norms)[:, None]
    np.testing.assert_allclose(moved, -0.1 * clipped.sum(0) / 10 / 4, rtol=1e-5)


def test_along_enough_directions_it_is_the_gradient() -> None:
    """The mean of (g z) z over directions is g, so the estimate is the gradient and nothing else."""
    rows = data(1)
    plan = terms(
        steps=1, sample_rate=1.0, private=False, noise_multiplier=None, expected_batch_size=1, learning_rate=1.0
    )
    _, moved = train(DpTraining(Point(), linear, rows, plan, silent()), looking(per_step=4096))
    found = replay(np.zeros(SIZE, dtype=np.float32), moved, looking(per_step=4096))
    right = -rows.values[0].numpy()
    assert np.linalg.norm(found - right) < 0.1 * np.linalg.norm(right)


@pytest.mark.parametrize("private", [True, False])
def test_the_replay_is_the_sites_adapter_bit_for_bit(private: bool) -> None:
    model, rows = Point(), data()
    layout = Layout.of(model)
    start = layout.read(model)
    plan = terms(steps=7, private=private, noise_multiplier=1.0 if private else None)
    outcome, moved = train(DpTraining(model, curved, rows, plan, Randomness.from_os()), looking())
    assert moved.dtype == np.float32
    assert moved.shape == (28,)
    np.testing.assert_array_equal(replay(start, moved, looking()), layout.read(model))
    assert not np.array_equal(start, layout.read(model))
    assert (outcome.event is not None) == private


def test_no_record_moves_a_step_by_more_than_the_bound() -> None:
    rows, along = data(12), looking()
    for bound in (0.05, 2.0, 50.0):
        plan = terms(
            steps=1, sample_rate=1.0, max_grad_norm=bound, expected_batch_size=1, learning_rate=float(along.per_step)
        )
        whole = train(DpTraining(Point(), curved, rows, plan, silent()), along)[1].astype(np.float64)
        for left_out in range(12):
            rest = rows.select([i for i in range(12) if i != left_out])
            without = train(DpTraining(Point(), curved, rest, plan, silent()), along)[1].astype(np.float64)
            assert np.linalg.norm(whole - without) <= bound * (1 + 1e-5) + 1e-4


@pytest.mark.statistical
def test_noise_has_the_planned_scale_and_no_other() -> None:
    along = looking(per_step=50)
    plan = terms(steps=40, sample_rate=1e-9, noise_multiplier=2.0, learning_rate=1.0)
    _, moved = train(DpTraining(Point(), curved, data(), plan, Randomness.for_simulation(3, "noise")), along)
    noise = moved.astype(np.float64) * 10 * 50 / (2.0 * 2.0)
    assert stats.kstest(noise, "norm").pvalue > 0.01
    for wrong in (0.8, 1.25):
        assert stats.kstest(noise, stats.norm(scale=wrong).cdf).pvalue < 1e-4


@pytest.mark.parametrize("poison", ["nan", "raises"])
def test_a_record_on_which_the_model_fails_leaves_no_trace(poison: str) -> None:
    def touchy(model: Any, rows: Rows) -> Tensor:
        if bool((rows.values > 50).any()):
            if poison == "raises":
                raise RuntimeError("Mr Smith")
            return rows.values.sum(1) * math.nan
        return curved(model, rows)

    rows, plan = data(8), terms(sample_rate=1.0)
    clean = train(DpTraining(Point(), touchy, rows, plan, silent()), looking())[1]
    bad = Rows(torch.cat([rows.values[:3], torch.full((1, SIZE), 99.0), rows.values[3:]]))
    outcome, moved = train(DpTraining(Point(), touchy, bad, plan, silent()), looking())
    np.testing.assert_array_equal(moved, clean)
    assert outcome.dropped == 3  # one in each step


def test_it_learns_under_privacy() -> None:
    """Moves towards the mean of the records, with the noise of epsilon 8 for this number of steps."""
    rows, model = Rows(torch.ones(200, SIZE)), Point()
    before = float(curved(model, rows).detach().mean())
    along = looking(spacing=1e-3)
    examples = (rows.select([i]) for i in range(8))
    bound = median_slope(model, curved, examples, along)
    plan = terms(steps=60, sample_rate=0.2, expected_batch_size=40, max_grad_norm=bound, learning_rate=0.2)
    train(DpTraining(model, curved, rows, plan, Randomness.for_simulation(1, "learn")), along)
    assert float(curved(model, rows).detach().mean()) < before / 4


def test_bad_directions_and_models_are_refused() -> None:
    spacings = ({"spacing": spacing} for spacing in (0.0, 9e-6, 1.0, math.nan, math.inf))
    for changes in ({"seed": b"short"}, {"per_step": 0}, *spacings):
        with pytest.raises(ConfigError):
            Directions(**({"seed": bytes(32), "per_step": 1, "spacing": 1e-3} | changes))
    with pytest.raises(PrivacyRefusal, match="trainable"):
        train(DpTraining(Point().requires_grad_(False), curved, data(), terms(), silent()), looking())
    mean = DpTraining(Point(), lambda m, r: curved(m, r).mean(), data(), terms(sample_rate=1.0), silent())
    with pytest.raises(PrivacyRefusal, match="one loss per example"):
        train(mean, looking())
    with pytest.raises(ConfigError, match=r"median slope=.* must be from 1e-09"):
        median_slope(Point(), lambda m, r: curved(m, r) * 1e-20, iter([data(1)]), looking())
    with pytest.raises(ConfigError, match="median slope"):
        median_slope(Point(), lambda m, r: r.values.sum(1) * 0, iter([data(1)]), looking())
