"""Pruned matrices: the promised zeros, the weights that matter, and nothing that a site's vetting takes for a trap."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from offsite.emulator.compressors.prune import STAYS, _smallest, _two_of_four, scores
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.emulator.vetting.weight_checks import _matrix_checks

SHAPES = ((576, 576), (1536, 576), (576, 1536), (192, 576))
HALF: dict[str, Callable[[Tensor], Tensor]] = {
    "prune:0.5": lambda score: _smallest(score, score.shape[1] // 2),
    "prune_2_4": _two_of_four,
}


def uneven(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """A random matrix, and inputs of few sources, some of them far louder than others as in trained models."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=draw)
    sources = torch.randn(512, 24, generator=draw) @ torch.randn(24, shape[1], generator=draw)
    inputs = (sources + torch.randn(512, shape[1], generator=draw)) * torch.randn(shape[1], generator=draw).exp()
    return weight, inputs


def root_mean_square(inputs: Tensor) -> Tensor:
    return inputs.square().mean(0).sqrt()


def refused(weight: Tensor) -> set[str]:
    draw = torch.Generator().manual_seed(0)
    return {check.name for check in _matrix_checks("w", weight, VettingThresholds(), draw) if not check.passed}


@pytest.mark.parametrize("way", sorted(HALF))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_wide_matrix_with_uneven_inputs_passes_the_vetting(way: str, shape: tuple[int, int]) -> None:
    weight, inputs = uneven(shape, seed=shape[0])
    norms = root_mean_square(inputs)
    kept = weight.masked_fill(HALF[way](scores(weight, norms)), 0.0)
    plain = weight.masked_fill(HALF[way](weight.abs() * norms), 0.0)
    assert refused(kept) == set()
    assert way == "prune_2_4" or "one_hot" in refused(plain)  # Wanda's own choice empties the quiet columns
    assert (kept == 0).sum(1).tolist() == [shape[1] // 2] * shape[0]


@pytest.mark.parametrize("share", [Fraction(1, 4), Fraction(1, 2)])
@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (8, 64), (576, 576)])
def test_each_row_loses_its_share_and_each_column_keeps_a_quarter(shape: tuple[int, int], share: Fraction) -> None:
    weight, inputs = uneven(shape, seed=3)
    score = scores(weight, root_mean_square(inputs))
    zeros = _smallest(score, int(share * shape[1]))
    assert zeros.sum(1).tolist() == [int(share * shape[1])] * shape[0]
    assert int((~zeros).sum(0).min()) >= shape[0] // STAYS
    assert bool((score > 1).logical_and(zeros).any()) is False


def test_with_even_inputs_it_is_wandas_choice() -> None:
    """Without a quiet column, Wanda keeps the quarter that stays as well, but for a few entries."""
    draw = torch.Generator().manual_seed(4)
    weight, norms = torch.randn(256, 128, generator=draw), torch.ones(128)
    mine, plain = (_smallest(score, 64) for score in (scores(weight, norms), weight.abs()))
    assert float((mine != plain).float().mean()) < 0.01


def test_a_row_that_cannot_keep_all_still_loses_its_share() -> None:
    """One row is the largest relative to itself in every column; half of the row goes all the same."""
    weight = torch.full((8, 16), 0.01)
    weight[1:, 0] = 10.0  # so only the first row is large relative to itself in the other columns
    weight[0] = 1.0
    zeros = _smallest(scores(weight, torch.ones(16)), 8)
    assert zeros.sum(1).tolist() == [8] * 8


def test_a_column_that_is_always_outbid_keeps_its_turn() -> None:
    """Four alike columns claim the same rows; two of four must go, and the quietest must not lose each time."""
    draw = torch.Generator().manual_seed(5)
    weight = torch.randn(64, 1, generator=draw).expand(64, 4) * (1 + 0.1 * torch.rand(64, 4, generator=draw))
    zeros = _two_of_four(scores(weight.contiguous(), torch.tensor([1e-4, 1.0, 2.0, 3.0])))
    assert int((~zeros[:, 0]).sum()) >= 64 // STAYS // 4
