"""Norms against sums in exact arithmetic, where float32 alone loses digits, overflows or vanishes."""

import math

import pytest
import torch

from offsite.privacy.norms import PIECE, row_norms


def exact(row: torch.Tensor) -> float:
    """Returns the norm by a sum that does not round, of numbers that were scaled to near 1."""
    scale = float(row.abs().max())
    return scale * math.sqrt(math.fsum((float(number) / scale) ** 2 for number in row))


@pytest.mark.parametrize("width", [1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5, 300_000])
@pytest.mark.parametrize("size", [0.1, 1e-30, 1e30])
def test_a_norm_is_exact_to_a_millionth(width: int, size: float) -> None:
    """Equal numbers are the worst case: every rounding of a long sum in float32 has the same sign."""
    rows = torch.full((2, width), size)
    rows[1] *= torch.linspace(-1, 1, width)
    if width == 1:
        rows[1] = -size
    for row, norm in zip(rows, row_norms(rows), strict=True):
        assert float(norm) == pytest.approx(exact(row), rel=1e-6)


def test_a_number_that_is_none_makes_its_own_row_none_alone() -> None:
    rows = torch.ones(3, 2 * PIECE)
    rows[0, 5], rows[1, 5] = torch.nan, torch.inf
    norms = row_norms(rows).tolist()
    assert norms[1:] == [math.inf, pytest.approx(math.sqrt(2 * PIECE))]
    assert math.isnan(norms[0])


def test_other_shapes_and_dtypes() -> None:
    assert row_norms(torch.ones(2, 3, 3)).tolist() == [3.0, 3.0]
    assert row_norms(torch.tensor([3.0, -4.0])).tolist() == [3.0, 4.0]
    assert row_norms(torch.zeros(0, 4)).shape == (0,)
    assert row_norms(torch.full((1, 4), 2.0, dtype=torch.bfloat16)).tolist() == [4.0]
