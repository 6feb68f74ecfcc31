"""DP-ZO: training by forward passes alone; one privatised number leaves per step and direction, not a gradient.

Zhang et al. 2024, arXiv 2401.04343, algorithm 1; directions from shared seeds as in Qin et al. 2023, arXiv 2312.06353.
The mechanism sees a model only through its losses, so it is private for any adapter method and any quantised weight.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import nn

from offsite.adapter.layout import Layout
from offsite.errors import ConfigError
from offsite.privacy.batches import Batch, Losses
from offsite.privacy.clipped_sum import Counted
from offsite.privacy.faults import failure, refuse_broken
from offsite.privacy.mechanism import DpSgdConfig, DpTraining, Outcome
from offsite.privacy.norms import CLIP_MARGIN
from offsite.privacy.per_example import checked_losses
from offsite.privacy.ranges import LOWEST_SPACING, check_range
from offsite.privacy.shares import Compute, Share, State, divided

SEED_BYTES = 32


@dataclass(frozen=True)
class Directions:
    """The public directions of one training; every party draws the same ones.

    Attributes:
      seed: 32 bytes that belong to this training alone.
      per_step: number K of directions that each step looks along, >= 1.
      spacing: distance along a direction at which a loss is taken, on both sides, in [1e-5, 1).
    """

    seed: bytes
    per_step: int
    spacing: float

    def __post_init__(self) -> None:
        """Refuses a seed, a number or a spacing that gives no direction."""
        if len(self.seed) != SEED_BYTES:
            raise ConfigError(f"seed bytes={len(self.seed)} must be {SEED_BYTES}; hash the name of the training")
        if self.per_step < 1:
            raise ConfigError(f"directions={self.per_step} must be at least 1; 8 is usual")
        if not LOWEST_SPACING <= self.spacing < 1:
            raise ConfigError(f"spacing={self.spacing} must be from {LOWEST_SPACING:g} to below 1; 1e-3 is usual")

    def draw(self, index: int, size: int) -> NDArray[np.float64]:
        """Returns direction `index` of the training, float64 (size,), each entry +1 or -1.

        Signs are bits of an AES-256-CTR keystream and the same on every machine. Normal numbers would need logarithms
        and cosines, which may differ in their last bit.
        """
        stream = Cipher(algorithms.AES256(self.seed), modes.CTR(index.to_bytes(8, "big") + bytes(8))).encryptor()
        bits = np.unpackbits(np.frombuffer(stream.update(bytes((size + 7) // 8)), dtype=np.uint8), count=size)
        return bits.astype(np.float64) * 2 - 1


def displacement(coefficients: NDArray[Any], directions: Directions, size: int) -> NDArray[np.float64]:
    """Returns how far an adapter moved in all, float64 (size,).

    Args:
      coefficients: distance moved along each direction, in order, real (steps * per_step,).
      directions: directions of that training.
      size: number d of the adapter's scalars.
    """
    moved = np.zeros(size)
    for index, coefficient in enumerate(coefficients):
        moved += float(coefficient) * directions.draw(index, size)
    return moved


def replay(start: NDArray[np.float32], coefficients: NDArray[Any], directions: Directions) -> NDArray[np.float32]:
    """Returns an adapter after all steps of a training from the released numbers; bit for bit the site's adapter.

    Args:
      start: adapter before the training, float32 (d,).
      coefficients: distance moved along each direction, as for `displacement`.
      directions: directions of that training.
    """
    return (start + displacement(coefficients, directions, start.size)).astype(np.float32)


def train(training: DpTraining, directions: Directions) -> tuple[Outcome, NDArray[np.float32]]:
    """Trains as `privacy.mechanism.train` does, with the same spending and without any backward pass.

    Each drawn record gives K numbers: the slopes of its loss along the step's directions. The K numbers are clipped
    together to `max_grad_norm` and added up over the records. Each sum gets noise of standard deviation
    noise_multiplier * max_grad_norm: the Gaussian mechanism in K dimensions.

    Args:
      training: model, records and terms; `engine` and `physical_batch` are ignored. A record is always alone in its
        batch: slopes divide differences of losses by the spacing, so the rounding of a shared batch would tell of the
        other records.
      directions: public directions of this training.

    Returns:
      The outcome, and how far the adapter moved along each direction, float32 (steps * K,); `replay` turns these
      numbers into the adapter.

    Raises:
      PrivacyRefusal: nothing trains, or losses are not one number per example.
      MemoryError: memory is too short for a single example.
      TrainingFault: the model fails on invented records as well, so that a step would be noise alone.
    """
    training.parameters()
    terms = training.terms
    walk = DirectionalState(training.model, directions, training.invented)
    norms: list[float] = []
    sizes: list[int] = []
    losses: list[float] = []
    for step in range(terms.steps):
        drawn = training.draw()
        slopes, means = _slopes(training, walk, drawn, step)
        step_norms = np.linalg.norm(slopes, axis=1)
        total = (slopes * _factors(step_norms, terms)[:, None]).sum(axis=0)
        if terms.private:
            noise = training.randomness.normal(directions.per_step)
            total += noise * (terms.noise_multiplier or 0.0) * terms.max_grad_norm
        walk.move(step, -terms.learning_rate * total / terms.expected_batch_size / directions.per_step)
        norms += step_norms.tolist()
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


def _slopes(
    training: DpTraining, walk: "DirectionalState", drawn: NDArray[np.int64], step: int
) -> tuple[NDArray[np.float64], list[float]]:
    """Returns the slopes of one step's records, in order, taken here and at the workers; see `DirectionalState`."""
    own, *others = divided(drawn, training.workers)
    for worker, part in zip(training.workers, others, strict=True):
        worker.send(walk.state(step), training.records.select(part))
    slopes, means = walk.slopes(training.losses, training.records.select(own), step)
    for worker in training.workers:
        share = worker.receive()
        slopes, means = np.concatenate([slopes, *share.arrays]), means + share.counted.losses
    return slopes, means


@contextmanager
def slope_shares(model: nn.Module, losses: Losses, directions: Directions, invented: Batch | None) -> Iterator[Compute]:
    """Yields the function from distance, step and records to slopes, for a worker whose model has the start's adapter.

    Args:
      model: model with the adapter from which the training starts.
      losses: function from model and batch to one loss per example, (B,).
      directions: public directions of the training.
      invented: see `privacy.faults`.
    """
    walk = DirectionalState(model, directions, invented)

    def compute(state: State, records: Any) -> Share:
        rows, means = walk.slopes(losses, records, walk.place(state))
        return Share((rows,), Counted(means))

    yield compute


def median_slope(model: nn.Module, losses_fn: Losses, batches: Iterator[Any], directions: Directions) -> float:
    """Returns the median norm of single examples' K slopes on PUBLIC examples, the default `max_grad_norm` of DP-ZO.

    Args:
      model: model with its adapter attached; unchanged afterwards.
      losses_fn: function from model and batch to one loss per example, (B,).
      batches: public examples, one in each batch.
      directions: any directions of the same number and spacing as the job's.

    Raises:
      ConfigError: no example has finite slopes, or the median is no bound that a plan can have.
    """
    walk = DirectionalState(model, directions)
    slopes, _ = walk.slopes_of(losses_fn, list(batches), 0)
    walk.settle()
    median = float(np.median(np.linalg.norm(slopes, axis=1))) if len(slopes) else math.nan
    if not median > 0:
        raise ConfigError(f"median slope={median} of {len(slopes)} public examples must be > 0; add public examples")
    check_range("median slope", median)
    return median


class DirectionalState:
    """A model's adapter on its way along directions; the distance from the start is kept in float64.

    Args:
      model: model with the adapter at the start.
      directions: public directions.
      invented: see `privacy.faults`.
    """

    def __init__(self, model: nn.Module, directions: Directions, invented: Batch | None = None) -> None:
        self._model, self._directions, self._layout = model, directions, Layout.of(model)
        self._invented = invented
        self._start, self._sum = self._layout.read(model), np.zeros(self._layout.size)
        self.moved: list[np.float32] = []

    def state(self, step: int) -> State:
        """Returns the distance from the start and the number of the step, for another process."""
        return self._sum.copy(), np.array([step], dtype=np.float64)

    def place(self, state: State) -> int:
        """Takes over the distance from the start, and returns the number of the step."""
        self._sum, (step,) = state[0], state[1]
        return int(step)

    def slopes(self, losses_fn: Losses, records: Batch, step: int) -> tuple[NDArray[np.float64], list[float]]:
        """Returns as `slopes_of` does, for each record alone in its batch."""
        return self.slopes_of(losses_fn, [records.select([row]) for row in range(len(records))], step)

    def slopes_of(self, losses_fn: Losses, examples: list[Any], step: int) -> tuple[NDArray[np.float64], list[float]]:
        """Returns the slopes of the examples whose slopes are finite, (b, K), and the means of their losses."""
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
        """Moves the adapter along the step's directions by the numbers as they leave, rounded to float32."""
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
        losses = np.full(len(examples), np.nan)

        def take(batch: Any, row: int) -> None:
            with torch.no_grad():
                losses[row] = float(checked_losses(losses_fn, self._model, batch)[0])

        def try_out(batch: Any) -> None:
            with torch.no_grad():
                checked_losses(losses_fn, self._model, batch)

        for row, example in enumerate(examples):
            # The loss stays NaN where the model fails, and the example is left out.
            if failure(partial(take, row=row), example) is not None and self._invented is not None:
                refuse_broken(try_out, self._invented)
        return losses

    def _write(self, adapter: NDArray[np.float64]) -> None:
        self._layout.write(self._model, adapter)


def _factors(norms: NDArray[np.float64], terms: DpSgdConfig) -> NDArray[np.float64]:
    if not terms.private:
        return np.ones_like(norms)
    with np.errstate(divide="ignore"):
        return np.minimum(terms.max_grad_norm * (1 - CLIP_MARGIN) / norms, 1.0)
