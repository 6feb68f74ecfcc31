"""Clip, add noise, step: Opacus' optimizer with our arithmetic and our noise."""

from typing import Any

import torch
from opacus.optimizers import DPOptimizerFastGradientClipping

from offsite.privacy.randomness import Randomness


class NoisyMeanOptimizer(DPOptimizerFastGradientClipping):
    """Takes steps along (sum of clipped gradients + noise) / expected batch size.

    `privacy.clipped_sum` makes the sum; sum, noise and division are float64. The noise is the same whatever is in the
    sum.
    Abadi et al. 2016 (arXiv 1607.00133), algorithm 1.

    Args:
      optimizer: optimizer of the trainable parameters.
      randomness: source of the noise.
      private: whether gradients are clipped and noise is added.
      **kwargs: arguments of Opacus' optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, randomness: Randomness, private: bool, **kwargs: Any):
        super().__init__(optimizer, **kwargs)
        self._randomness = randomness
        self._private = private

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
