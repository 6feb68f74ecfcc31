"""Weighted ridge regression, the bias that removes a mean error, and the weights that make positions count alike."""

import torch
from torch import Tensor

from offsite.emulator.calibration.stream import Hidden


def rows(hidden: Hidden) -> Tensor:
    """Returns hidden states as one matrix (positions, width)."""
    return torch.cat([states.reshape(-1, states.shape[-1]) for states in hidden])


def position_weights(target: Tensor) -> Tensor:
    """Returns 1 / mean square of each row of a target (positions, width), float32 (positions,).

    The first position of a text often has hidden states a hundred times larger than all others, and every block reads
    hidden states through a norm. So an error counts by its share of the row, not by its size.
    """
    return 1 / target.square().mean(-1).clamp_min(1e-9)


def weighted_error(target: Tensor, outputs: Tensor) -> Tensor:
    """Returns the weighted square error of outputs (positions, width), summed over positions, a scalar."""
    return (position_weights(target).unsqueeze(-1) * (target - outputs).square()).sum()


def centred(bias: Tensor | None, target: Tensor, outputs: Tensor) -> Tensor:
    """Returns the bias (width,) that makes the weighted mean of a segment's outputs equal to the target's.

    The bias is exact if the layer's output is added to the segment's, as the output of a block's last layer is (Nagel
    et al. 2019, section 4.2).

    Args:
      bias: present bias (width,); None for zeros.
      target: wanted outputs of the segment, (positions, width).
      outputs: outputs of the segment with the present bias, (positions, width).
    """
    weights = position_weights(target).unsqueeze(-1)
    shift = (weights * (target - outputs)).sum(0) / weights.sum()
    return shift if bias is None else bias + shift


def ridge(inputs: Tensor, outputs: Tensor, weights: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Returns (matrix (out, in), bias (out,)) with the least weighted square error of inputs matrix^T + bias.

    Args:
      inputs: inputs of the map, (positions, in).
      outputs: wanted outputs of the map, (positions, out).
      weights: weight of each position, (positions,), > 0.
      strength: penalty on the matrix over the mean of the inputs' weighted second moments, > 0; about 1e-2 for few
        positions for each input, 1e-4 for many.
    """
    x, y, w = inputs.double(), outputs.double(), weights.double().unsqueeze(-1)
    mean_x, mean_y = (w * x).sum(0) / w.sum(), (w * y).sum(0) / w.sum()
    centred = x - mean_x
    moments = centred.T @ (w * centred)
    moments.diagonal().add_(strength * moments.diagonal().mean() + torch.finfo(torch.float64).tiny)
    matrix = torch.linalg.solve(moments, centred.T @ (w * (y - mean_y)))
    return matrix.T.float(), (mean_y - mean_x @ matrix).float()
