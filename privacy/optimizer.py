"""Clip, add noise, step: Opacus' optimizer with our arithmetic and our noise."""

import statistics
from typing import Any

import torch
from opacus.optimizers import DPOptimizerFastGradientClipping
from torch import Tensor

from offsite.privacy.norms import CLIP_MARGIN
from offsite.privacy.randomness import Randomness


class NoisyMeanOptimizer(DPOptimizerFastGradientClipping):
    """Takes steps along (sum of clipped gradients + noise) / expected batch size.

    An engine makes the sum and asks `weigh` for each example's factor; sum, noise and division are float64. An example
    that no engine asks about is not in the sum, and the noise is the same as if the example had never been there.
    Abadi et al. 2016 (arXiv 1607.00133), algorithm 1.

    Args:
      optimizer: optimizer of the trainable parameters.
      randomness: source of the noise.
      private: whether gradients are clipped and noise is added.
      **kwargs: arguments of Opacus' optimizer.

    Attributes:
      norms: gradient norms of the examples seen, before clipping; private, for diagnosis only.
      clipped: number of these norms above the bound.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, randomness: Randomness, private: bool, **kwargs: Any):
        super().__init__(optimizer, **kwargs)
        self._randomness = randomness
        self._private = private
        self.norms: list[float] = []
        self.clipped = 0

    @property
    def median_norm(self) -> float:
        """The median of the norms, or NaN when no example has been seen."""
        return statistics.median(self.norms) if self.norms else float("nan")

    def weigh(self, norms: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Returns the factors that clip gradients of these norms, float64 (b,); all 1 where nothing is private."""
        bound = self.max_grad_norm * (1 - CLIP_MARGIN)
        return (bound / norms).clamp(max=1.0) if self._private else torch.ones_like(norms)

    def seen(self, norms: tuple[float, ...]) -> None:
        """Counts examples whose gradients are now in the sum."""
        self.norms += norms
        if self._private:
            self.clipped += sum(norm > self.max_grad_norm * (1 - CLIP_MARGIN) for norm in norms)

    def accumulate(self) -> None:
        """Sets an empty sum to zero, so that a step without examples is noise alone."""
        for parameter in self.params:
            if parameter.summed_grad is None:
                parameter.summed_grad = torch.zeros_like(parameter, dtype=torch.float64)

    def add_noise(self) -> None:
        """Sets `p.grad` to the sum plus noise of standard deviation noise_multiplier * max_grad_norm."""
        for parameter in self.params:
            total = parameter.summed_grad  # changed in place, since the sum is this step's own
            if self._private:
                scale = self.noise_multiplier * self.max_grad_norm
                noise = torch.from_numpy(self._randomness.normal(parameter.numel())).mul_(scale)
                total.add_(noise.view(parameter.shape).to(parameter.device))
            parameter.grad = total.div_(self.expected_batch_size).to(parameter.dtype)

    def scale_grad(self) -> None:
        """Does nothing: `add_noise` has divided, before the sum is rounded to the parameter's dtype."""
