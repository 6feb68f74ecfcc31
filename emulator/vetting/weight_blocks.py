"""Statistics of a weight, stored or not, of which some rows at a time are widened to float32."""

from collections.abc import Iterator
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from offsite.emulator.package.stored_weight import BLOCK, StoredWeight

Weight: TypeAlias = Tensor | StoredWeight
# Sampled rows and columns, drawn at random, for shares of rows; exact for models up to this width. In a wider model the
# sample's share passes its limit with a probability under 1e-5 where the matrix's own share is below half the limit
# (binomial tail), and a trap of one row in a hundred still gives ten sampled rows. Magnitudes, ratios of norms, zeros
# and finiteness are always exact.
ROWS, COLUMNS = 1024, 8192


def matrix_shape(weight: Weight) -> tuple[int, int]:
    """Returns (rows, columns) of a weight, where columns are all dimensions but the first; a vector is one row."""
    if len(weight.shape) < 2:
        return 1, prod(weight.shape)
    return weight.shape[0], prod(weight.shape[1:])


def blocks_of(weight: Weight) -> Iterator[Tensor]:
    """Yields the rows of a weight in order, float32 (n, columns)."""
    rows, columns = matrix_shape(weight)
    if isinstance(weight, StoredWeight):
        yield from (block.reshape(-1, columns) for _, block in weight.blocks())
    else:
        for block in weight.detach().reshape(rows, columns).split(max(BLOCK // max(columns, 1), 1)):
            yield block.float()


def peak(weight: Weight) -> float:
    """Returns the largest magnitude, which is not finite if any value is not."""
    return float(torch.stack([block.abs().max() for block in blocks_of(weight)]).max())


def root_mean_square(weight: Weight) -> float:
    """Returns the root of the mean square of all values."""
    squares = [block.square().sum().double() for block in blocks_of(weight)]
    return float((torch.stack(squares).sum() / prod(weight.shape)).sqrt())


def norms(weight: Weight, *, columns: bool = False) -> Tensor:
    """Returns the Euclidean norm of each row, float32 (rows,), or of each column, (columns,)."""
    if not columns:
        return torch.cat([block.norm(dim=1) for block in blocks_of(weight)])
    squares = [block.square().sum(0).double() for block in blocks_of(weight)]
    return torch.stack(squares).sum(0).sqrt().float()


def zeros(weight: Weight) -> float:
    """Returns the share of zeros."""
    return 1 - sum(int(torch.count_nonzero(block)) for block in blocks_of(weight)) / prod(weight.shape)


def sample(weight: Weight, generator: torch.Generator, *, columns: bool = False) -> Tensor:
    """Returns at most `ROWS` rows with at most `COLUMNS` entries, float32; or as many columns, as rows.

    Args:
      weight: a weight.
      generator: generator of the choice.
      columns: whether columns are drawn in the place of rows.
    """
    shape = matrix_shape(weight)
    chosen = [
        torch.randperm(length, generator=generator)[:count] if length > count else torch.arange(length)
        for length, count in zip(reversed(shape) if columns else shape, (ROWS, COLUMNS), strict=True)
    ]
    rows, entries = (index.to(weight.device) for index in (reversed(chosen) if columns else chosen))
    if isinstance(weight, StoredWeight):
        step = max(BLOCK // max(shape[1], 1), 1)
        parts = (weight.rows(part).reshape(-1, shape[1])[:, entries] for part in rows.split(step))
        picked = torch.cat(list(parts))
    else:
        picked = weight.detach().reshape(shape)[rows][:, entries].float()
    return picked.T if columns else picked
