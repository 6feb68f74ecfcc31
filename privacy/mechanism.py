"""Record-level DP-SGD: one training at one site, and the event that the training spends."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from offsite.errors import ConfigError, PrivacyRefusal, lookup
from offsite.privacy.accountants import check_noise
from offsite.privacy.batches import Batch, Losses, trainable
from offsite.privacy.engines import ENGINES
from offsite.privacy.events import Event, check_sample_rate, check_steps
from offsite.privacy.faults import failure, refuse_broken
from offsite.privacy.per_example import Engine, Weigh
from offsite.privacy.randomness import Randomness
from offsite.privacy.ranges import MAX_PHYSICAL_BATCH, check_range
from offsite.privacy.sampler import poisson

if TYPE_CHECKING:
    from offsite.privacy.optimizer import NoisyMeanOptimizer

log = logging.getLogger("offsite.privacy")


@dataclass(frozen=True)
class DpSgdConfig:
    """Public constants of a plan, agreed before any private record is read.

    Attributes:
      noise_multiplier: standard deviation of the noise over `max_grad_norm`; None or 0 only without privacy.
      max_grad_norm: bound on the norm of one record's gradient, in [1e-9, 1e9]; ignored without privacy.
      sample_rate: probability with which a record joins a step, in (0, 1].
      expected_batch_size: divisor of the sum, in [1e-9, 1e9]; a constant, never the number of records present.
      steps: number of logical steps, >= 1.
      learning_rate: step size of plain SGD, in [1e-9, 1e9].
      physical_batch: number of examples in one backward pass, from 1 to `privacy.ranges.MAX_PHYSICAL_BATCH`; it changes
        memory and speed, not the result.
      engine: name of the per-example gradient engine, a key of `privacy.engines.ENGINES`.
      private: whether to clip and to add noise; False serves comparisons, and the outcome then has no event.
    """

    noise_multiplier: float | None
    max_grad_norm: float
    sample_rate: float
    expected_batch_size: float
    steps: int
    learning_rate: float
    physical_batch: int = 8
    engine: str = "bookkeeping"
    private: bool = True

    def __post_init__(self) -> None:
        """Refuses terms under which the accountant would compute the privacy of another mechanism."""
        check_sample_rate(self.sample_rate)
        check_steps(self.steps)
        lookup(ENGINES, self.engine, "engine")
        for name in ("max_grad_norm", "expected_batch_size", "learning_rate"):
            check_range(name, getattr(self, name))
        check_range("physical_batch", self.physical_batch, 1, MAX_PHYSICAL_BATCH)
        if self.private and not self.noise_multiplier:
            raise PrivacyRefusal(
                f"noise_multiplier={self.noise_multiplier} gives no privacy; calibrate the noise, or set private=False"
            )
        if self.private:
            check_range("noise_multiplier", self.event().noise_multiplier)
            check_noise(self.event().noise_multiplier)
        elif self.noise_multiplier:
            raise ConfigError(f"noise_multiplier={self.noise_multiplier} has no use with private=False; set it to None")

    def event(self) -> Event:
        """Returns the event that one training under these terms spends.

        Raises:
          ConfigError: the terms have no noise, so no epsilon exists.
        """
        return Event(self.noise_multiplier or 0.0, self.sample_rate, self.steps)


@dataclass(frozen=True)
class Outcome:
    """The event of a training, and diagnostics.

    Only `event` may leave the site. Every other field is computed from private records without noise.

    Attributes:
      event: spending that the accountant has to count; None without privacy.
      losses: mean loss of each step before its update, nats; NaN for a step without examples.
      norm_median: median gradient norm before clipping, over the examples of all steps; NaN without examples.
      batch_sizes: number of records drawn in each step.
      clipped_fraction: share of gradients above the bound; 0 without privacy.
      dropped: number of examples left out because their loss or gradient was not finite, or the model failed on them.
    """

    event: Event | None
    losses: tuple[float, ...]
    norm_median: float
    batch_sizes: tuple[int, ...]
    clipped_fraction: float
    dropped: int


@dataclass(frozen=True, eq=False)
class DpTraining:
    """One training with record-level privacy: the input of `train` and of `privacy.zero_order.train`.

    Run `privacy.probe.probe` first: it refuses models for which the clipped gradients would not be one record's own.

    Attributes:
      model: model to train in place; only parameters with `requires_grad` change.
      losses: function from model and batch to one loss per example, (B,).
      records: private records of this site; their number decides nothing but who can be drawn.
      terms: public constants of the plan.
      randomness: source of the sampling and of the noise; `Randomness.from_os()` on private data.
      invented: invented examples of the records' shape, which tell a fault of the machine from a fault of a record, see
        `privacy.faults`; without them, every fault counts as a record's.
    """

    model: nn.Module = field(repr=False)
    losses: Losses
    records: Batch = field(repr=False)
    terms: DpSgdConfig
    randomness: Randomness = field(repr=False)
    invented: Batch | None = field(default=None, repr=False)

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that train.

        Raises:
          PrivacyRefusal: nothing trains.
        """
        if not (parameters := list(trainable(self.model).values())):
            raise PrivacyRefusal("trainable parameters=0, must be at least 1; attach an adapter before training")
        return parameters

    def draw(self) -> np.ndarray:
        """Returns the records of the next step, indices int64 (size,)."""
        return poisson(len(self.records), self.terms.sample_rate, self.randomness)


def _nothing() -> None:
    """Does nothing after a step."""


def train(training: DpTraining, after_step: Callable[[], None] = _nothing) -> Outcome:
    """Trains the trainable parameters of a model in place, privately for each record.

    Args:
      training: model, records and terms; modes and hooks of the model are as before afterwards.
      after_step: function called after each noisy step. The function may change the parameters, but may not look at
        the records: all that leaves the site has to follow from the noisy steps.

    Raises:
      PrivacyRefusal: nothing trains, or the engine cannot tell the examples apart.
      MemoryError: memory is too short for a single example.
      TrainingFault: the model fails on invented records as well, so that a step would be noise alone.
    """
    terms, parameters = training.terms, training.parameters()
    means: list[float] = []
    sizes: list[int] = []
    dropped = 0
    with lookup(ENGINES, terms.engine, "engine")(training.model) as engine:
        optimizer = _optimizer(parameters, terms, training.randomness)
        sums = _Accumulation(training, engine, optimizer)
        for _ in range(terms.steps):
            drawn = training.draw()
            losses = sums.add(drawn)
            optimizer.step()  # noise and update, the same whether or not there were examples
            optimizer.zero_grad(set_to_none=True)
            after_step()
            sizes.append(len(drawn))
            means.append(float(np.mean(losses)) if losses else math.nan)
            dropped += len(drawn) - len(losses)
    return Outcome(
        event=terms.event() if terms.private else None,
        losses=tuple(means),
        norm_median=optimizer.median_norm,
        batch_sizes=tuple(sizes),
        clipped_fraction=optimizer.clipped / max(len(optimizer.norms), 1),
        dropped=dropped,
    )


def _optimizer(parameters: list[nn.Parameter], terms: DpSgdConfig, randomness: Randomness) -> "NoisyMeanOptimizer":
    from offsite.privacy.optimizer import (
        NoisyMeanOptimizer,  # Opacus takes 2 s of CPU, and a site waits before it trains
    )

    return NoisyMeanOptimizer(
        torch.optim.SGD(parameters, lr=terms.learning_rate),
        randomness=randomness,
        private=terms.private,
        noise_multiplier=terms.noise_multiplier or 0.0,
        max_grad_norm=terms.max_grad_norm,
        expected_batch_size=terms.expected_batch_size,
    )


class _Accumulation:
    """Adds the clipped gradients of logical batches to the optimizer's sum, one physical batch after another.

    Where memory is too short for a physical batch, all later ones have half as many examples, down to one. The size
    decides memory and speed, and of the result no more than its rounding.
    """

    def __init__(self, training: DpTraining, engine: Engine, optimizer: "NoisyMeanOptimizer") -> None:
        self._training, self._engine, self._optimizer = training, engine, optimizer
        self._size = training.terms.physical_batch
        self._losses: list[float] = []

    def add(self, drawn: np.ndarray) -> list[float]:
        """Adds one logical batch, and returns the finite losses.

        Args:
          drawn: records of the step, indices int64 (size,).

        Raises:
          PrivacyRefusal: the engine cannot tell the examples apart.
          MemoryError: memory is too short for a single example.
          TrainingFault: the model fails on invented records as well.
        """
        self._losses, start = [], 0
        while start < len(drawn):
            part = drawn[start : start + self._size]
            if self._adds(self._training.records.select(part)):
                start += len(part)
            else:
                self._size = max(1, len(part) // 2)
                log.warning("memory is too short: physical_batch=%d from now on", self._size)
                if torch.accelerator.is_available():
                    torch.accelerator.empty_cache()
        return self._losses

    def _adds(self, batch: Any) -> bool:
        """Adds a physical batch, and says whether memory was enough; if not, nothing of the batch is in the sum."""
        before = len(self._losses)
        try:
            self._add_good(batch)
        except MemoryError:
            if len(batch) == 1 or len(self._losses) > before:
                raise
            return False
        return True

    def _add_good(self, batch: Any) -> None:
        """Adds a physical batch without the records on which the model fails.

        A fault may not tell on which records the model fails: such records are left out. Another record stands in the
        place of each, so that the batch keeps its shape and all others every bit of their gradients.
        """
        if failure(self._add, batch) is None:
            return
        if self._training.invented is not None:
            refuse_broken(self._try, self._training.invented)
        good = {row for row in range(len(batch)) if failure(self._try, batch.select([row])) is None}
        rows = [row if row in good else min(good) for row in range(len(batch)) if good]
        if failure(partial(self._add, counted=good.__contains__), batch.select(rows)) is not None:
            for row in sorted(good):  # they fail together only
                failure(self._add, batch.select([row]))

    def _add(self, batch: Any, counted: Callable[[int], bool] = lambda _: True) -> None:
        rows = self._engine.add(self._training.losses, batch, _only(counted, self._optimizer.weigh))
        seen = [place for place, position in enumerate(rows.kept) if counted(position)]
        self._optimizer.seen(tuple(rows.norms[place] for place in seen))
        self._losses.extend(rows.losses[place] for place in seen)

    def _try(self, batch: Any) -> None:
        """Adds nothing of a batch, or fails as adding would."""
        self._add(batch, lambda _: False)


def _only(counted: Callable[[int], bool], weigh: Weigh) -> Weigh:
    """Returns the factors of `weigh` for the positions that count, and 0 for all others."""

    def factors(norms: torch.Tensor, positions: tuple[int, ...]) -> torch.Tensor:
        return weigh(norms, positions) * torch.tensor([counted(position) for position in positions])

    return factors
