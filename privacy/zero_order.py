"""DP-ZO: training by forward passes alone; per step and direction one privatised number leaves, not a gradient.

Zhang et al. 2024, arXiv 2401.04343, algorithm 1; directions from shared seeds as in Qin et al. 2023, arXiv 2312.06353.
The mechanism sees a model only through its losses, so it is private for any adapter method and any quantised weight.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import nn

from offsite.adapter.layout import Layout
from offsite.errors import ConfigError, PrivacyRefusal
from offsite.privacy.batches import Losses, trainable
from offsite.privacy.mechanism import DpSgdConfig, Outcome, fails
from offsite.privacy.optimizer import CLIP_MARGIN
from offsite.privacy.per_example import checked_losses
from offsite.privacy.randomness import Randomness
from offsite.privacy.sampler import poisson

SEED_BYTES = 32


@dataclass(frozen=True)
class Directions:
    """The public directions of one training; every party draws the same ones.

    Attributes:
      seed: 32 bytes that belong to this training alone.
      per_step: K, directions that each step looks along, >= 1.
      spacing: how far along a direction a loss is taken, to both sides, > 0.
    """

    seed: bytes
    per_step: int
    spacing: float

    def __post_init__(self) -> None:
        """Refuses what gives no direction."""
        if len(self.seed) != SEED_BYTES:
            raise ConfigError(f"seed bytes={len(self.seed)} must be {SEED_BYTES}; hash what the training is known by")
        if self.per_step < 1:
            raise ConfigError(f"directions={self.per_step} must be at least 1; 8 is usual")
        if not (math.isfinite(self.spacing) and self.spacing > 0):
            raise ConfigError(f"spacing={self.spacing} must be finite and > 0; 1e-3 is usual")

    def draw(self, index: int, size: int) -> NDArray[np.float64]:
        """Returns direction `index` of the training, float64 (size,), each entry +1 or -1.

        Signs and not normal numbers: they are bits of an AES-256-CTR keystream, the same on every machine, where
        logarithms and cosines may differ in their last bit.
        """
        stream = Cipher(algorithms.AES256(self.seed), modes.CTR(index.to_bytes(8, "big") + bytes(8))).encryptor()
        bits = np.unpackbits(np.frombuffer(stream.update(bytes((size + 7) // 8)), dtype=np.uint8), count=size)
        return bits.astype(np.float64) * 2 - 1


def displacement(coefficients: NDArray[Any], directions: Directions, size: int) -> NDArray[np.float64]:
    """Returns how far an adapter moved in all, float64 (size,).

    Args:
      coefficients: along each direction, in order, real (steps * per_step,).
      directions: of that training.
      size: d, of the adapter.
    """
    moved = np.zeros(size)
    for index, coefficient in enumerate(coefficients):
        moved += float(coefficient) * directions.draw(index, size)
    return moved


def replay(start: NDArray[np.float32], coefficients: NDArray[Any], directions: Directions) -> NDArray[np.float32]:
    """Returns an adapter after all steps of a training, from the numbers that left; bit for bit what the site has.

    Args:
      start: adapter before, float32 (d,).
      coefficients: as for `displacement`.
      directions: of that training.
    """
    return (start + displacement(coefficients, directions, start.size)).astype(np.float32)


def train(
    model: nn.Module,
    losses_fn: Losses,
    select: Callable[[np.ndarray], Any],
    n: int,
    terms: DpSgdConfig,
    randomness: Randomness,
    directions: Directions,
) -> tuple[Outcome, NDArray[np.float32]]:
    """Trains as `privacy.mechanism.train` does and spends what it spends, without any backward pass.

    Each record drawn gives K numbers, its loss' slopes along the step's directions. They are clipped together to
    `max_grad_norm`, added up, and get noise of noise_multiplier * max_grad_norm each: the Gaussian mechanism in K
    dimensions.

    Args:
      model: as for `privacy.mechanism.train`.
      losses_fn: as there.
      select: as there.
      n: as there.
      terms: public constants; `engine` and `physical_batch` are ignored. A record is always alone in its batch: the
        slopes divide differences of losses by the spacing, and by how others change the rounding of a batch they
        would tell of them.
      randomness: as there.
      directions: of this training.

    Returns:
      What was spent, and how far the adapter moved along each direction, float32 (steps * K,); `replay` gives the
      adapter of them.

    Raises:
      PrivacyRefusal: nothing trains, or losses are not one number per example.
    """
    if not trainable(model):
        raise PrivacyRefusal("trainable parameters=0, must be at least 1; attach an adapter before training")
    walk = _DirectionalState(model, directions)
    norms: list[float] = []
    sizes: list[int] = []
    losses: list[float] = []
    for step in range(terms.steps):
        drawn = poisson(n, terms.sample_rate, randomness)
        slopes, means = walk.slopes(losses_fn, [select(drawn[[row]]) for row in range(len(drawn))], step)
        found = np.linalg.norm(slopes, axis=1)
        total = (slopes * _factors(found, terms)[:, None]).sum(axis=0)
        if terms.private:
            total += randomness.normal(directions.per_step) * (terms.noise_multiplier or 0.0) * terms.max_grad_norm
        walk.move(step, -terms.learning_rate * total / terms.expected_batch_size / directions.per_step)
        norms += found.tolist()
        sizes.append(len(drawn))
        losses.append(float(np.mean(means)) if means else math.nan)
    walk.settle()
    bound = terms.max_grad_norm * (1 - CLIP_MARGIN)
    clipped = sum(norm > bound for norm in norms) if terms.private else 0
    outcome = Outcome(
        event=terms.event() if terms.private else None,
        losses=tuple(losses),
        norm_median=float(np.median(norms)) if norms else math.nan,
        batch_sizes=tuple(sizes),
        clipped_fraction=clipped / max(len(norms), 1),
        dropped=sum(sizes) - len(norms),
    )
    return outcome, np.array(walk.moved, dtype=np.float32)


def median_slope(model: nn.Module, losses_fn: Losses, batches: Iterator[Any], directions: Directions) -> float:
    """Returns the median norm of single examples' K slopes on PUBLIC examples, the default `max_grad_norm` of DP-ZO.

    Args:
      model: with its adapter attached; as before afterwards.
      losses_fn: (model, batch) -> one loss per example, (B,).
      batches: public examples, one in each batch.
      directions: any of the same number and spacing.

    Raises:
      ConfigError: no example has finite slopes, or the median is 0.
    """
    walk = _DirectionalState(model, directions)
    slopes, _ = walk.slopes(losses_fn, list(batches), 0)
    walk.settle()
    median = float(np.median(np.linalg.norm(slopes, axis=1))) if len(slopes) else math.nan
    if not median > 0:
        raise ConfigError(f"median slope={median} of {len(slopes)} public examples must be > 0; add public examples")
    return median


class _DirectionalState:
    """A model's adapter on its way along directions; how far it is from its start is float64, beside the model."""

    def __init__(self, model: nn.Module, directions: Directions) -> None:
        self._model, self._directions, self._layout = model, directions, Layout.of(model)
        self._start, self._sum = self._layout.read(model), np.zeros(self._layout.size)
        self.moved: list[np.float32] = []

    def slopes(self, losses_fn: Losses, examples: list[Any], step: int) -> tuple[NDArray[np.float64], list[float]]:
        """Returns the slopes of those examples that have finite ones, (b, K), and their losses' means."""
        spacing, count = self._directions.spacing, self._directions.per_step
        rows, means = np.zeros((len(examples), count)), np.zeros(len(examples))
        for k in range(count):
            direction = self._direction(step, k) * spacing
            above = self._losses(losses_fn, examples, self._start + (self._sum + direction))
            below = self._losses(losses_fn, examples, self._start + (self._sum - direction))
            rows[:, k] = (above - below) / (2 * spacing)
            means += (above + below) / (2 * count)
        finite = np.isfinite(rows).all(axis=1)
        return rows[finite], means[finite].tolist()

    def move(self, step: int, along: NDArray[np.float64]) -> None:
        """Moves the adapter along the step's directions, by what float32 keeps of the numbers, which is what leaves."""
        for k, coefficient in enumerate(along.astype(np.float32)):
            self._sum += float(coefficient) * self._direction(step, k)
            self.moved.append(coefficient)

    def settle(self) -> None:
        """Writes the adapter into the model as `replay` gives it."""
        self._write(self._start + self._sum)

    def _direction(self, step: int, k: int) -> NDArray[np.float64]:
        return self._directions.draw(step * self._directions.per_step + k, self._layout.size)

    def _losses(self, losses_fn: Losses, examples: list[Any], adapter: NDArray[np.float64]) -> NDArray[np.float64]:
        self._write(adapter)
        found = np.full(len(examples), np.nan)
        for row, example in enumerate(examples):

            def take(one: Any, row: int = row) -> None:
                with torch.no_grad():
                    found[row] = float(checked_losses(losses_fn, self._model, one)[0])

            fails(take, example)  # one on which the model fails stays NaN, and is left out
        return found

    def _write(self, adapter: NDArray[np.float64]) -> None:
        self._layout.write(self._model, adapter)


def _factors(norms: NDArray[np.float64], terms: DpSgdConfig) -> NDArray[np.float64]:
    if not terms.private:
        return np.ones_like(norms)
    with np.errstate(divide="ignore"):
        return np.minimum(terms.max_grad_norm * (1 - CLIP_MARGIN) / norms, 1.0)
