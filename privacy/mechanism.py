"""Record-level DP-SGD: one training at one site, and the event that it spent."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from offsite.errors import ConfigError, PrivacyRefusal, lookup
from offsite.privacy.accountants import check_noise
from offsite.privacy.batches import Losses, trainable
from offsite.privacy.engines import ENGINES
from offsite.privacy.events import Event, check_sample_rate, check_steps
from offsite.privacy.optimizer import NoisyMeanOptimizer
from offsite.privacy.per_example import Engine
from offsite.privacy.randomness import Randomness
from offsite.privacy.sampler import poisson


@dataclass(frozen=True)
class DpSgdConfig:
    """Public constants of a plan, agreed before any private record is read.

    Attributes:
      noise_multiplier: noise standard deviation / max_grad_norm; None or 0 only when not private.
      max_grad_norm: bound on one record's gradient norm, > 0; ignored when not private.
      sample_rate: probability with which a record joins a step, in (0, 1].
      expected_batch_size: what the sum is divided by, > 0; a constant, never the number of records present.
      steps: logical steps of this training, >= 1.
      learning_rate: of plain SGD, > 0.
      physical_batch: examples per backward pass, >= 1; changes memory and speed, not the result.
      engine: a key of `privacy.engines.ENGINES`.
      private: False = no clipping and no noise, to compare with; the outcome then has no event.
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
        """Refuses terms under which the mechanism would not be the one that is accounted for."""
        check_sample_rate(self.sample_rate)
        check_steps(self.steps)
        lookup(ENGINES, self.engine, "engine")
        for name in ("max_grad_norm", "expected_batch_size", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}={value} must be finite and > 0; correct the plan")
        if self.physical_batch < 1:
            raise ConfigError(f"physical_batch={self.physical_batch} must be >= 1; 8 is the default")
        if self.private and not self.noise_multiplier:
            raise PrivacyRefusal(
                f"noise_multiplier={self.noise_multiplier} is no privacy; calibrate it, or set private=False and say so"
            )
        if self.private:
            check_noise(self.event().noise_multiplier)
        elif self.noise_multiplier:
            raise ConfigError(f"noise_multiplier={self.noise_multiplier} has no use with private=False; set it to None")

    def event(self) -> Event:
        """Returns what one training under these terms spends.

        Raises:
          ConfigError: the terms have no noise, so no epsilon exists.
        """
        return Event(self.noise_multiplier or 0.0, self.sample_rate, self.steps)


@dataclass(frozen=True)
class Outcome:
    """What a training spent, and diagnostics of it.

    Only `event` may leave the site. All else is computed from private records without noise.

    Attributes:
      event: what the accountant has to count; None when not private.
      losses: mean loss per step before the update, nats; NaN for a step without examples.
      norm_median: median gradient norm before clipping; NaN without examples.
      batch_sizes: number of records drawn per step.
      clipped_fraction: share of gradients above the bound, 0 when not private.
      dropped: examples left out because their loss or gradient was not finite, or the model failed on them.
    """

    event: Event | None
    losses: tuple[float, ...]
    norm_median: float
    batch_sizes: tuple[int, ...]
    clipped_fraction: float
    dropped: int


def train(
    model: nn.Module,
    losses_fn: Losses,
    select: Callable[[np.ndarray], Any],
    n: int,
    terms: DpSgdConfig,
    randomness: Randomness,
) -> Outcome:
    """Trains the trainable parameters of a model in place, privately for each of n records.

    Run `privacy.probe.probe` first: it refuses models for which the clipped gradients would not be one record's own.

    Args:
      model: only parameters with `requires_grad` change; modes and hooks are as before afterwards.
      losses_fn: (model, batch) -> one loss per example, (B,).
      select: indices int64 (B,) -> the batch of those records, a `privacy.batches.Batch`.
      n: number of records here, >= 0; it decides nothing but who can be drawn.
      terms: public constants.
      randomness: of the sampling and of the noise; `Randomness.from_os()` on private data.

    Raises:
      PrivacyRefusal: nothing trains, or the engine cannot tell the examples apart.
    """
    parameters = list(trainable(model).values())
    if not parameters:
        raise PrivacyRefusal("trainable parameters=0, must be at least 1; attach an adapter before training")
    losses: list[float] = []
    sizes: list[int] = []
    unseen = 0
    with lookup(ENGINES, terms.engine, "engine")(model) as engine:
        optimizer = _optimizer(parameters, terms, randomness)
        for _ in range(terms.steps):
            drawn = poisson(n, terms.sample_rate, randomness)
            found = _accumulate(model, losses_fn, select, drawn, terms.physical_batch, engine, optimizer)
            optimizer.step()  # noise and update, the same whether or not there were examples
            optimizer.zero_grad(set_to_none=True)
            sizes.append(len(drawn))
            losses.append(float(np.mean(found)) if found else math.nan)
            unseen += len(drawn) - len(found)
    return Outcome(
        event=terms.event() if terms.private else None,
        losses=tuple(losses),
        norm_median=optimizer.median_norm,
        batch_sizes=tuple(sizes),
        clipped_fraction=optimizer.clipped / max(len(optimizer.norms), 1),
        dropped=unseen,
    )


def _optimizer(parameters: list[nn.Parameter], terms: DpSgdConfig, randomness: Randomness) -> NoisyMeanOptimizer:
    return NoisyMeanOptimizer(
        torch.optim.SGD(parameters, lr=terms.learning_rate),
        randomness=randomness,
        private=terms.private,
        noise_multiplier=terms.noise_multiplier or 0.0,
        max_grad_norm=terms.max_grad_norm,
        expected_batch_size=terms.expected_batch_size,
    )


def _accumulate(
    model: nn.Module,
    losses_fn: Losses,
    select: Callable[[np.ndarray], Any],
    drawn: np.ndarray,
    physical_batch: int,
    engine: Engine,
    optimizer: NoisyMeanOptimizer,
) -> list[float]:
    """Adds the clipped gradients of one logical batch to the optimizer's sum; returns the finite losses."""
    found: list[float] = []

    def add(batch: Any) -> None:
        rows = engine.add(losses_fn, batch, optimizer.weigh)
        optimizer.seen(rows.norms)
        found.extend(rows.losses)

    for start in range(0, len(drawn), physical_batch):
        batch = select(drawn[start : start + physical_batch])
        if fails(add, batch):  # a model must not tell by a fault on which records it fails: those are left out
            for row in range(len(batch)):
                fails(add, batch.select([row]))
    return found


def fails(add: Callable[[Any], None], batch: Any) -> bool:
    """Adds a batch to the sum, and says whether the model failed on it; nothing of it is in the sum then.

    Raises:
      PrivacyRefusal: the engine cannot tell the examples apart.
      MemoryError: there is too little memory, which no record decides.
    """
    try:
        add(batch)
    except (PrivacyRefusal, MemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        return True
    return False
