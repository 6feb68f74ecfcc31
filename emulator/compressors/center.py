"""Closed-form healing that costs some bytes: the mean of a segment's outputs becomes the full model's."""

from typing import Any

from torch import Tensor, nn

from offsite.emulator.calibration.draft import SegmentContext
from offsite.emulator.calibration.least_squares import centred, rows, weighted_error
from offsite.emulator.compressors.pairs import pairs_of
from offsite.emulator.package.recipe_arguments import no_argument


def center(context: SegmentContext, argument: str) -> None:
    """Moves the bias of a feed-forward network's last layer by the mean error, if the error falls.

    Rounding shifts a layer's outputs as a whole, and later layers take the shift for a signal (Nagel et al. 2019,
    section 4.2). Codes that were chosen before stay as they are, so in a recipe `center` stands behind the quantiser.
    """
    no_argument("center", argument)
    pairs = pairs_of(context)
    if not pairs:
        return
    path = pairs[-1].down
    target, outputs = rows(context.target), rows(context.outputs())
    layer: Any = context.draft.module(path)
    before = getattr(layer, "bias", None)
    _set_bias(context, path, centred(before, target, outputs))
    if weighted_error(target, rows(context.outputs())) > weighted_error(target, outputs):
        _set_bias(context, path, before)


def _set_bias(context: SegmentContext, path: str, bias: Tensor | None) -> None:
    """Gives a layer another bias, or None, and leaves the weight and the weight's storage as they are."""
    layer: Any = context.draft.module(path)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    context.draft.changed.add(f"{path}.bias")
