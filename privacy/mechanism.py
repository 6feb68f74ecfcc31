"""Record-level DP-SGD: one training at one site, and the event that the training spends."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from offsite.errors import ConfigError, PrivacyRefusal, lookup
from offsite.privacy.accountants import check_noise
from offsite.privacy.batches import Batch, Losses, trainable
from offsite.privacy.clipped_sum import ClippedSum, Counted, clipping
from offsite.privacy.engines import ENGINES
from offsite.privacy.events import Event, check_sample_rate, check_steps
from offsite.privacy.norms import CLIP_MARGIN
from offsite.privacy.per_example import Engine
from offsite.privacy.randomness import Randomness
from offsite.privacy.ranges import MAX_PHYSICAL_BATCH, check_range
from offsite.privacy.sampler import poisson
from offsite.privacy.shares import (
    Compute,
    Share,
    State,
    Worker,
    add_share,
    divided,
    parameter_state,
    put_state,
    taken_sums,
)

if TYPE_CHECKING:
    from offsite.privacy.optimizer import NoisyMeanOptimizer


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
      workers: further processes of the site that take shares of each step's records; they have begun this training.
    """

    model: nn.Module = field(repr=False)
    losses: Losses
    records: Batch = field(repr=False)
    terms: DpSgdConfig
    randomness: Randomness = field(repr=False)
    invented: Batch | None = field(default=None, repr=False)
    workers: Sequence[Worker] = field(default=(), repr=False)

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
    steps: list[Counted] = []
    sizes: list[int] = []
    with lookup(ENGINES, terms.engine, "engine")(training.model) as engine:
        optimizer = _optimizer(parameters, terms, training.randomness)
        sums = _sums(engine, training.losses, terms, training.invented)
        for _ in range(terms.steps):
            drawn = training.draw()
            counted = _add_up(training, sums, drawn)
            optimizer.step()  # noise and update, the same whether or not there were examples
            optimizer.zero_grad(set_to_none=True)
            after_step()
            sizes.append(len(drawn))
            steps.append(counted)
    norms = [norm for counted in steps for norm in counted.norms]
    bound = terms.max_grad_norm * (1 - CLIP_MARGIN)
    return Outcome(
        event=terms.event() if terms.private else None,
        losses=tuple(float(np.mean(counted.losses)) if counted.losses else math.nan for counted in steps),
        norm_median=statistics.median(norms) if norms else math.nan,
        batch_sizes=tuple(sizes),
        clipped_fraction=sum(norm > bound for norm in norms) / max(len(norms), 1) if terms.private else 0.0,
        dropped=sum(sizes) - len(norms),
    )


def _add_up(training: DpTraining, sums: ClippedSum, drawn: np.ndarray) -> Counted:
    """Adds up one step's records, here and at the workers, and returns the examples that are in the sum."""
    own, *others = divided(drawn, training.workers)
    state = parameter_state(training.model) if others else ()
    for worker, part in zip(training.workers, others, strict=True):
        worker.send(state, training.records.select(part))
    counted = sums.add(training.records, own)
    for worker in training.workers:
        share = worker.receive()
        add_share(training.model, share)
        counted += share.counted
    return counted


@contextmanager
def gradient_shares(model: nn.Module, losses: Losses, terms: DpSgdConfig, invented: Batch | None) -> Iterator[Compute]:
    """Yields the function from parameters and records to clipped sums, for a worker; its engine is open meanwhile.

    Args:
      model: model whose trainable parameters are those of the training.
      losses: function from model and batch to one loss per example, (B,).
      terms: terms of the training; the worker draws nothing and adds no noise.
      invented: see `privacy.faults`.
    """
    with lookup(ENGINES, terms.engine, "engine")(model) as engine:
        sums = _sums(engine, losses, terms, invented)

        def compute(state: State, records: Batch) -> Share:
            taken_sums(model)  # what a step that failed has left
            put_state(model, state)
            counted = sums.add(records, range(len(records)))
            return Share(taken_sums(model), counted)

        yield compute


def _sums(engine: Engine, losses: Losses, terms: DpSgdConfig, invented: Batch | None) -> ClippedSum:
    weigh = clipping(terms.max_grad_norm, private=terms.private)
    return ClippedSum(engine, losses, weigh, terms.physical_batch, invented)


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
