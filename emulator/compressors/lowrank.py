"""Low rank with activation whitening: each dense layer becomes two thin layers, the best for its inputs."""

import torch
from torch import Tensor

from offsite.emulator.calibration.draft import SegmentContext
from offsite.emulator.calibration.least_squares import position_weights
from offsite.emulator.package.recipe_arguments import fraction
from offsite.emulator.structure.replacements import LowRank, frozen, weight_of

DAMPING = 1e-4


def lowrank(context: SegmentContext, argument: str) -> None:
    """Replaces each dense layer by two thin layers that together have a fraction of the weights.

    This is truncation-aware whitening of Wang et al. 2025 (SVD-LLM), section 3.1: with S S^T the second moments of the
    layer's inputs, cutting W S after the largest singular values loses least of the output.
    """
    share = fraction("lowrank", argument)
    layers = context.draft.layers()
    seen = context.observe(layers)
    for path, inputs in seen.items():
        layer = layers[path]
        weight = weight_of(layer)
        outputs, width = weight.shape
        rank = max(1, int(share * outputs * width / (outputs + width)))
        if rank * (outputs + width) >= outputs * width:
            continue  # two thin layers would be larger than the dense layer
        up, down = _factors(weight, inputs, rank)
        bias = getattr(layer, "bias", None)
        part = LowRank(width, outputs, rank, bias=bias is not None).requires_grad_(False).eval()
        part.up, part.down = frozen(up), frozen(down)
        if bias is not None and part.bias is not None:
            part.bias = frozen(bias.detach().clone())
        context.draft.replace(path, part)


def _factors(weight: Tensor, inputs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns (up (out, rank), down (rank, in)), float32."""
    x = inputs.double() * position_weights(inputs).sqrt().unsqueeze(-1).double()
    moments = x.T @ x / len(x)
    moments.diagonal().add_(DAMPING * moments.diagonal().mean() + torch.finfo(torch.float64).tiny)
    root = torch.linalg.cholesky(moments)
    left, values, right = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    half = values[:rank].sqrt()
    # right S^-1, by solving with the triangle instead of an inverse
    down = torch.linalg.solve_triangular(root, right[:rank], upper=False, left=False)
    return (left[:, :rank] * half).float(), (half.unsqueeze(-1) * down).float()
