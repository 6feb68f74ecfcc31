"""DP-SGD on an adapter: Poisson batches, per-example clipping, noise, plain SGD steps (Abadi et al. 2016)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from errors import RangeError, lookup
from privacy.accountants import check_noise
from privacy.engines import ENGINES, Gradients, Losses, trainable
from privacy.events import Event
from privacy.randomness import Randomness
from privacy.sampler import poisson


@dataclass(frozen=True)
class Terms:
    """The public numbers of one training run; none follows from the private records.

    Attributes:
      noise_multiplier: noise standard deviation over `max_grad_norm`.
      max_grad_norm: clipping bound C of one example's gradient, > 0.
      sample_rate: Poisson sampling rate.
      expected_batch_size: what the noisy sum is divided by.
      steps: SGD steps.
      learning_rate: of plain SGD.
      physical_batch: examples per forward pass; changes memory only.
      engine: name in `ENGINES`.
      private: False neither clips nor adds noise.
    """

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    expected_batch_size: int
    steps: int
    learning_rate: float
    physical_batch: int = 8
    engine: str = "hooks"
    private: bool = True

    def __post_init__(self) -> None:
        """Refuses what would void the promise."""
        if self.private:
            check_noise(self.noise_multiplier)
        for name in ("max_grad_norm", "expected_batch_size", "learning_rate", "physical_batch"):
            if not getattr(self, name) > 0:
                raise RangeError(f"{name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True)
class Outcome:
    """What a run did, and diagnostics that must stay at the site.

    Attributes:
      event: for the accountant; None without privacy.
      losses: mean loss of each step's batch, nats; None for an empty batch.
      batch_sizes: records of each step's batch.
      median_norm: median gradient norm of all examples before clipping; 0 when there was none.
      clipped_fraction: share of examples above the bound.
      dropped: examples whose loss or gradient was not finite, and that therefore did not contribute.
    """

    event: Event | None
    losses: list[float | None]
    batch_sizes: list[int]
    median_norm: float
    clipped_fraction: float
    dropped: int


class NoisyOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' DP optimizer with noise from our stream, added in float64."""

    def __init__(self, optimizer: torch.optim.Optimizer, terms: Terms, randomness: Randomness) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=terms.noise_multiplier,
            max_grad_norm=terms.max_grad_norm,
            expected_batch_size=terms.expected_batch_size,
            loss_reduction="mean",
        )
        self._randomness = randomness

    def add_noise(self) -> None:
        """Adds noise of standard deviation sigma * C to each clipped sum."""
        for parameter in self.params:
            noise = torch.from_numpy(self._randomness.normal(parameter.numel())).reshape(parameter.shape)
            scale = self.noise_multiplier * self.max_grad_norm
            total = parameter.summed_grad.double() + scale * noise.to(parameter.device)
            parameter.grad = total.to(parameter.dtype)


class _Run:
    """The state of one training run: optimizer, and diagnostics so far."""

    def __init__(self, model: nn.Module, losses: Losses, gradients: Gradients, terms: Terms, rng: Randomness) -> None:
        self.parameters = [parameter for _, parameter in trainable(model)]
        self._losses, self._gradients, self._terms = losses, gradients, terms
        plain = torch.optim.SGD(self.parameters, lr=terms.learning_rate)
        self._optimizer = NoisyOptimizer(plain, terms, rng) if terms.private else plain
        self.losses: list[float | None] = []
        self.sizes: list[int] = []
        self.norms: list[float] = []
        self.dropped = 0

    def step(self, indices: np.ndarray, select: Callable[[np.ndarray], Any]) -> None:
        """Takes one logical step over a batch of any size, an empty one too: then the step is noise alone."""
        chunks = [indices[i : i + self._terms.physical_batch] for i in range(0, len(indices), self._terms.physical_batch)]
        self._optimizer.zero_grad()
        found: list[float] = []
        last = len(chunks) - 1
        for place, chunk in enumerate(chunks):
            values, samples = self._examples(select(chunk))
            found += values
            self._accumulate(samples, last=place == last)
        if not chunks:
            self._accumulate([p.new_zeros((0, *p.shape)) for p in self.parameters], last=True)
        self.losses.append(float(np.mean(found)) if found else None)
        self.sizes.append(len(indices))

    def _examples(self, batch: Any) -> tuple[list[float], list[Tensor]]:
        """Returns losses and per-example gradients of the examples whose gradients are finite; others leave no trace."""
        values, samples = self._gradients(self._losses, batch)
        squares = torch.stack([sample.double().flatten(1).square().sum(1) for sample in samples]).sum(0)
        finite = torch.isfinite(squares.float()) & torch.isfinite(values.to(squares.device))
        self.dropped += int((~finite).sum())
        self.norms += squares[finite].sqrt().tolist()
        return values[finite].tolist(), [sample[finite] for sample in samples]

    def _accumulate(self, samples: list[Tensor], *, last: bool) -> None:
        if self._terms.private:
            for parameter, sample in zip(self.parameters, samples, strict=True):
                parameter.grad_sample = sample  # type: ignore[attr-defined]
            self._optimizer.signal_skip_step(do_skip=not last)
            self._optimizer.step()
            self._optimizer.zero_grad()
            return
        for parameter, sample in zip(self.parameters, samples, strict=True):
            mean = sample.sum(0) / self._terms.expected_batch_size
            parameter.grad = mean if parameter.grad is None else parameter.grad + mean
        if last:
            self._optimizer.step()


def train(
    model: nn.Module,
    losses: Losses,
    select: Callable[[np.ndarray], Any],
    *,
    n: int,
    terms: Terms,
    randomness: Randomness,
) -> Outcome:
    """Trains the trainable parameters of a model in place.

    Args:
      model: only the adapter requires gradients; its engine has passed the probe.
      losses: one loss per example, (B,), of a model and a batch.
      select: returns the batch of some record indices.
      n: number of private records.
      terms: public numbers.
      randomness: the site's, for sampling and noise.

    Returns:
      The event that was performed, with diagnostics that must not leave the site.

    Raises:
      PrivacyRefusal: the noise is below the floor, or the engine gave no per-example gradient.
    """
    with lookup(ENGINES, terms.engine, "engine")(model) as gradients:
        run = _Run(model, losses, gradients, terms, randomness)
        for _ in range(terms.steps):
            run.step(poisson(n, terms.sample_rate, randomness), select)
    for parameter in run.parameters:
        parameter.grad = None
        for attribute in ("grad_sample", "summed_grad"):
            if hasattr(parameter, attribute):
                delattr(parameter, attribute)
    norms = np.array(run.norms)
    return Outcome(
        event=Event(terms.noise_multiplier, terms.sample_rate, terms.steps) if terms.private else None,
        losses=run.losses,
        batch_sizes=run.sizes,
        median_norm=float(np.median(norms)) if len(norms) else 0.0,
        clipped_fraction=float(np.mean(norms > terms.max_grad_norm)) if len(norms) else 0.0,
        dropped=run.dropped,
    )
