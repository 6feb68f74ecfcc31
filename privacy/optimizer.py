"""Clip, add up, add noise: Opacus' optimizer with our arithmetic and our noise."""

import math
import statistics
from typing import Any

import torch
from opacus.optimizers import DPOptimizer

from privacy.randomness import Randomness

# Rounding may not carry a clipped gradient over the bound, so it is clipped to a little less.
CLIP_MARGIN = 1e-4


def example_norms(rows: list[torch.Tensor]) -> torch.Tensor:
    """Returns the Euclidean norm of each example's whole gradient, float64 (B,).

    Args:
      rows: one tensor (B, *shape) per parameter. In float64 the square of no float32 number overflows.
    """
    squares = [_by_example(row).square().sum(1) for row in rows]
    return torch.stack([square.to(squares[0].device) for square in squares]).sum(0).sqrt()


def _by_example(rows: torch.Tensor) -> torch.Tensor:
    """Returns (B, numel) float64; B may be 0 and a parameter may be a scalar, so -1 would not do."""
    return rows.detach().double().reshape(rows.shape[0], math.prod(rows.shape[1:]))


class NoisyMeanOptimizer(DPOptimizer):
    """Takes steps along (sum of clipped gradients + noise) / expected batch size.

    Norms, clipping, sum and noise are float64. An example whose gradient is not finite is left out of the sum, and
    the noise is the same as if it had never been there. Abadi et al. 2016 (arXiv 1607.00133), algorithm 1.

    Attributes:
      norms: gradient norms of the examples seen, before clipping; private, for diagnosis only.
      clipped: how many of them were above the bound.
      dropped: how many examples had a gradient that is not finite.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, randomness: Randomness, private: bool, **kwargs: Any):
        super().__init__(optimizer, **kwargs)
        self._randomness = randomness
        self._private = private
        self.norms: list[float] = []
        self.clipped = 0
        self.dropped = 0

    @property
    def median_norm(self) -> float:
        """The median of the norms, or NaN when no example has been seen."""
        return statistics.median(self.norms) if self.norms else float("nan")

    def clip_and_accumulate(self) -> None:
        """Adds the clipped gradients of one physical batch to `p.summed_grad`, float64."""
        norms = example_norms(self.grad_samples)
        finite = torch.nonzero(torch.isfinite(norms)).flatten()  # an index, since 0 * NaN is NaN
        norms = norms[finite]
        bound = self.max_grad_norm * (1 - CLIP_MARGIN)
        coefficients = (bound / norms).clamp(max=1.0) if self._private else torch.ones_like(norms)
        for parameter in self.params:
            rows = parameter.grad_sample[finite.to(parameter.device)].detach().double()
            total = torch.tensordot(coefficients.to(parameter.device), rows, dims=1)
            parameter.summed_grad = total if parameter.summed_grad is None else parameter.summed_grad + total
        self.norms += norms.tolist()
        self.clipped += int((coefficients < 1).sum())
        self.dropped += len(self.grad_samples[0]) - len(finite)

    def add_noise(self) -> None:
        """Sets `p.grad` to the sum plus noise of standard deviation noise_multiplier * max_grad_norm."""
        for parameter in self.params:
            total = parameter.summed_grad
            if self._private:
                scale = self.noise_multiplier * self.max_grad_norm
                noise = torch.from_numpy(self._randomness.normal(parameter.numel())) * scale
                total = total + noise.view(parameter.shape).to(parameter.device)
            parameter.grad = (total / self.expected_batch_size).to(parameter.dtype)

    def scale_grad(self) -> None:
        """Does nothing: `add_noise` has divided, before the sum is rounded to the parameter's dtype."""
