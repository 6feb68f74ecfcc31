"""Closed-form healing: the last layer of a block's feed-forward network is fitted to what the full model has."""

from torch import Tensor, nn

from offsite.emulator.calibration.draft import Station
from offsite.emulator.calibration.least_squares import position_weights, ridge, rows
from offsite.emulator.compressors.arguments import no_argument
from offsite.emulator.compressors.pairs import dense_pairs
from offsite.emulator.structure.replacements import PATCH, dense_like, weight_of
from offsite.errors import ConfigError

STRENGTH = 1e-2
Values = tuple[Tensor, Tensor | None]


def refit(station: Station, argument: str) -> None:
    """Fits the last layer of each feed-forward network so that the stretch ends where the full model's does.

    A block that stays thereby does some of the work of those behind it that are left out, and makes good for the error
    that reached it.
    """
    no_argument("refit", argument)
    for pair in dense_pairs("refit", station):
        layer = station.span.module(pair.down)
        refit_layer(station, pair.down, [_values(layer)])


def refit_layer(station: Station, path: str, starts: list[Values]) -> None:
    """Puts the best of several fitted layers in the place of one whose output is added to the hidden states.

    Where it is not simply added (a norm stands behind it), the fit is worse than it promised: then the start that ends
    nearest the target stays as it is.

    Args:
      station: whose target is met.
      path: of the layer.
      starts: (weight (out, in), bias (out,) or None) to begin from, for the layer's present inputs.

    Raises:
      ConfigError: a patch stands behind it already, so that it does not reach the target by itself.
    """
    carrier = station.span.carrier
    if carrier and PATCH in station.span.blocks[carrier]._modules:
        raise ConfigError("refit or narrow after patch: the patch was fitted to the block as it was; write patch last")
    layer = station.span.module(path)
    target = rows(station.target)
    weights = position_weights(target)
    seen, present = station.observe_with_outputs({path: layer})
    inputs = seen[path]
    error = target - present
    best: tuple[float, nn.Module] = (float("inf"), layer)
    base = _values(layer)
    for start in starts:
        # What the stretch gives with another layer in the place, as far as the layer's output is simply added.
        left = error - _given(inputs, start) + _given(inputs, base)
        change, shift = ridge(inputs, left, weights, STRENGTH)
        fitted = (start[0] + change, shift if start[1] is None else start[1] + shift)
        for values, missing in ((start, left), (fitted, left - inputs @ change.T - shift)):
            size = _size(missing, weights)
            if size < best[0]:
                best = (size, dense_like(layer, *values))
    station.span.replace(path, best[1])
    if _size(target - rows(station.outputs()), weights) > 1.01 * best[0]:
        _try_each(station, path, layer, starts, target)


def _try_each(station: Station, path: str, layer: nn.Module, starts: list[Values], target: Tensor) -> None:
    """Takes the start that ends nearest the target as it is: the layer's output is not simply added."""
    weights = position_weights(target)
    tried = []
    for start in starts:
        candidate = dense_like(layer, *start)
        station.span.replace(path, candidate)
        tried.append((_size(target - rows(station.outputs()), weights), candidate))
    station.span.replace(path, min(tried, key=lambda one: one[0])[1])


def _values(layer: nn.Module) -> Values:
    return weight_of(layer), getattr(layer, "bias", None)


def _given(inputs: Tensor, values: Values) -> Tensor:
    weight, bias = values
    return inputs @ weight.T if bias is None else inputs @ weight.T + bias


def _size(error: Tensor, weights: Tensor) -> float:
    return float((weights * error.square().mean(-1)).mean())
