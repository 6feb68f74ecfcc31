"""Set the weights to zero that matter least for what enters a layer: two of each four, or a fraction of a row."""

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from offsite.emulator.calibration.draft import Station
from offsite.emulator.compressors.arguments import fraction, no_argument
from offsite.emulator.package.storage import SPARSE
from offsite.emulator.structure.replacements import weight_of

# One in so many of each input's weights stays, however quiet the input: a column that is left with few entries hands
# single ones on, as a trap does, and a site's vetting refuses it.
STAYS = 4


def prune(station: Station, argument: str) -> None:
    """Sets a fraction, at most a half, of each output's weights to zero: those of least |weight| x input norm.

    Sun et al. 2024 (Wanda), equation 1, but for a quarter of each input's weights, the largest ones beside the rest of
    their row: these go only where a row's fraction cannot be met without them.
    """
    share = fraction("prune", argument, "the fraction of zeros", Fraction(1, 2))
    _prune(station, lambda score: _least(score, int(share * score.shape[1])))


def prune_2_4(station: Station, argument: str) -> None:
    """Sets two of each four consecutive weights of an output to zero, by the same measure."""
    no_argument("prune_2_4", argument)
    _prune(station, _two_of_four)


def _prune(station: Station, zeros: Callable[[Tensor], Tensor]) -> None:
    layers = station.span.layers()
    for path, inputs in station.observe(layers).items():
        weight = weight_of(layers[path])
        weight.data[zeros(scores(weight, inputs.square().mean(0).sqrt()))] = 0.0
        name = f"{path}.weight"
        station.span.storage[name] = SPARSE
        station.span.pieces.pop(name, None)
        station.span.changed.add(name)


def scores(weight: Tensor, norms: Tensor) -> Tensor:
    """Returns what the entries of a matrix (out, in) are worth, (out, in): in 0..1, and above 1 where one shall stay.

    Args:
      weight: (out, in).
      norms: (in,), root mean square of each input.
    """
    score = weight.abs() * norms
    score = score / score.max().clamp_min(torch.finfo(score.dtype).tiny)
    relative = weight.abs() / weight.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
    count = -(-len(weight) // STAYS)
    first = relative.topk(count, dim=0).indices
    # By its place in its column and not by its size: else where a row cannot keep all, quiet inputs would lose all.
    places = torch.linspace(2, 1, count + 1, dtype=score.dtype)[:-1].unsqueeze(1).expand_as(first)
    return score.scatter(0, first, places)


def _least(score: Tensor, count: int) -> Tensor:
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, score.topk(count, dim=1, largest=False).indices, value=True)


def _two_of_four(score: Tensor) -> Tensor:
    columns = score.shape[1] // 4 * 4
    mask = torch.zeros_like(score, dtype=torch.bool)
    fours = score[:, :columns].reshape(-1, 4)
    mask[:, :columns] = _least(fours, 2).reshape(len(score), columns)
    return mask
