"""Closed-form healing: the last layer of a block's feed-forward network is fitted to the full model's outputs."""

from torch import Tensor, nn

from offsite.emulator.calibration.draft import SegmentContext
from offsite.emulator.calibration.least_squares import position_weights, ridge, rows
from offsite.emulator.compressors.pairs import dense_pairs
from offsite.emulator.package.recipe_arguments import no_argument
from offsite.emulator.structure.replacements import PATCH, dense_like, weight_of
from offsite.errors import ConfigError

STRENGTH = 1e-2
Values = tuple[Tensor, Tensor | None]


def refit(context: SegmentContext, argument: str) -> None:
    """Fits the last layer of each feed-forward network to the full model's outputs behind the segment.

    So a block that stays does some work of the left-out blocks behind it, and makes up for the error of its inputs.
    """
    no_argument("refit", argument)
    for pair in dense_pairs("refit", context):
        layer = context.draft.module(pair.down)
        refit_layer(context, pair.down, [_values(layer)])


def refit_layer(context: SegmentContext, path: str, starts: list[Values]) -> None:
    """Replaces a layer, whose output is added to the hidden states, by the best of several fitted layers.

    If the output is not simply added (a norm stands behind the layer), the fit is worse than it promised. Then the
    start that ends nearest the target is taken as it is.

    Args:
      context: the segment with its examples and its target.
      path: path of the layer.
      starts: values to begin from, for the layer's present inputs: weight (out, in) and bias (out,) or None.

    Raises:
      ConfigError: a patch stands behind the layer already, so that the layer alone cannot reach the target.
    """
    carrier = context.draft.carrier
    if carrier and PATCH in context.draft.blocks[carrier]._modules:
        raise ConfigError("refit or narrow after patch: the patch was fitted to the block as it was; write patch last")
    layer = context.draft.module(path)
    target = rows(context.target)
    weights = position_weights(target)
    seen, present = context.observe_with_outputs({path: layer})
    inputs = seen[path]
    error = target - present
    best: tuple[float, nn.Module] = (float("inf"), layer)
    base = _values(layer)
    for start in starts:
        # The segment's error with the start in the layer's place, as far as the layer's output is simply added.
        left = error - _apply(inputs, start) + _apply(inputs, base)
        change, shift = ridge(inputs, left, weights, STRENGTH)
        fitted = (start[0] + change, shift if start[1] is None else start[1] + shift)
        for values, missing in ((start, left), (fitted, left - inputs @ change.T - shift)):
            size = _size(missing, weights)
            if size < best[0]:
                best = (size, dense_like(layer, *values))
    context.draft.replace(path, best[1])
    if _size(target - rows(context.outputs()), weights) > 1.01 * best[0]:
        _try_each(context, path, layer, starts, target)


def _try_each(context: SegmentContext, path: str, layer: nn.Module, starts: list[Values], target: Tensor) -> None:
    """Takes the start that ends nearest the target as it is, for a layer whose output is not simply added."""
    weights = position_weights(target)
    tried = []
    for start in starts:
        candidate = dense_like(layer, *start)
        context.draft.replace(path, candidate)
        tried.append((_size(target - rows(context.outputs()), weights), candidate))
    context.draft.replace(path, min(tried, key=lambda pair: pair[0])[1])


def _values(layer: nn.Module) -> Values:
    return weight_of(layer), getattr(layer, "bias", None)


def _apply(inputs: Tensor, values: Values) -> Tensor:
    weight, bias = values
    return inputs @ weight.T if bias is None else inputs @ weight.T + bias


def _size(error: Tensor, weights: Tensor) -> float:
    return float((weights * error.square().mean(-1)).mean())
