"""Sets the weights to zero that matter least for a layer's inputs: two of each four, or a fraction of a row."""

from collections.abc import Callable

import torch
from torch import Tensor

from offsite.emulator.calibration.draft import SegmentContext
from offsite.emulator.package.recipe_arguments import fraction, no_argument
from offsite.emulator.package.storage import SPARSE
from offsite.emulator.structure.replacements import weight_of

# One in this many of each input's weights stays, however quiet the input: a column that is left with few entries hands
# single entries on, as a trap does, and a site's vetting refuses it.
STAYS = 4


def prune(context: SegmentContext, argument: str) -> None:
    """Sets a fraction, at most a half, of each output's weights to zero: those of least |weight| x input norm.

    The measure is Sun et al. 2024 (Wanda), equation 1. Unlike there, a quarter of each input's weights is kept, the
    largest ones relative to their row; such a weight goes only if a row's fraction cannot be met without it.
    """
    share = fraction("prune", argument)
    _prune(context, lambda score: _smallest(score, int(share * score.shape[1])))


def prune_2_4(context: SegmentContext, argument: str) -> None:
    """Sets two of each four consecutive weights of an output to zero, by the measure of `prune`."""
    no_argument("prune_2_4", argument)
    _prune(context, _two_of_four)


def _prune(context: SegmentContext, zeros: Callable[[Tensor], Tensor]) -> None:
    layers = context.draft.layers()
    for path, inputs in context.observe(layers).items():
        weight = weight_of(layers[path])
        weight.data[zeros(scores(weight, inputs.square().mean(0).sqrt()))] = 0.0
        name = f"{path}.weight"
        context.draft.storage[name] = SPARSE
        context.draft.pieces.pop(name, None)
        context.draft.changed.add(name)


def scores(weight: Tensor, norms: Tensor) -> Tensor:
    """Returns the worth of each entry of a matrix, (out, in): in 0..1, and above 1 for an entry that should stay.

    Args:
      weight: matrix (out, in).
      norms: root mean square of each input, (in,).
    """
    score = weight.abs() * norms
    score = score / score.max().clamp_min(torch.finfo(score.dtype).tiny)
    relative = weight.abs() / weight.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
    count = -(-len(weight) // STAYS)
    first = relative.topk(count, dim=0).indices
    # Ranked by place in the column and not by size: else quiet inputs would lose all weights in a row that is too full.
    places = torch.linspace(2, 1, count + 1, dtype=score.dtype, device=score.device)[:-1].unsqueeze(1).expand_as(first)
    return score.scatter(0, first, places)


def _smallest(score: Tensor, count: int) -> Tensor:
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, score.topk(count, dim=1, largest=False).indices, value=True)


def _two_of_four(score: Tensor) -> Tensor:
    columns = score.shape[1] // 4 * 4
    mask = torch.zeros_like(score, dtype=torch.bool)
    fours = score[:, :columns].reshape(-1, 4)
    mask[:, :columns] = _smallest(fours, 2).reshape(len(score), columns)
    return mask
