"""Euclidean norms that a bound on one record's influence can rest on."""

import torch
from torch import Tensor

# torch sums squares of float32 in float32: the sum of ten million equal numbers is 0.8 % too small, more than the
# margin under the bound. A sum of a thousand loses at most 4e-7, and these partial sums are added in float64; both
# together take a twentieth of the time of float64 throughout.
PIECE = 1024
# Rounding may not carry a clipped gradient over the bound, so gradients are clipped to a little less.
CLIP_MARGIN = 1e-4
TINY, HUGE = 1e-15, 1e15  # float32 cannot hold the squares of norms outside


def row_norms(rows: Tensor) -> Tensor:
    """Returns the norm of each row, float64 (B,), to a relative error below 1e-6; NaN or infinite if a number of it is.

    Args:
      rows: (B, ...), any floating dtype; B and the other lengths may be 0.
    """
    flat = rows.detach().flatten(1) if rows.ndim > 1 else rows.detach()[:, None]
    if flat.dtype != torch.float32:
        return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
    whole = flat.shape[1] // PIECE * PIECE
    squares = torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (-1, PIECE)), dim=2).double().square().sum(1)
    norms = (squares + torch.linalg.vector_norm(flat[:, whole:], dim=1).double().square()).sqrt()
    for row in torch.nonzero(~((norms > TINY) & (norms < HUGE))).flatten().tolist():
        norms[row] = torch.linalg.vector_norm(flat[row], dtype=torch.float64)
    return norms
