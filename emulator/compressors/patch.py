"""Closed-form healing: a linear map in the place of left-out blocks."""

from torch import nn

from offsite.emulator.calibration.draft import SegmentContext
from offsite.emulator.calibration.least_squares import position_weights, ridge, rows
from offsite.emulator.package.recipe_arguments import no_argument
from offsite.emulator.structure.replacements import PATCH, Patch, frozen

STRENGTH = 1e-4


def patch(context: SegmentContext, argument: str) -> None:
    """Puts the best linear map in the place of a segment's left-out blocks; changes nothing if there are none.

    The linear replacement of blocks is ReplaceMe's (Shopkhoev et al. 2025); here the map is fitted to its real inputs
    in the emulator.
    """
    no_argument("patch", argument)
    carrier = context.draft.carrier
    if carrier is None:
        return
    inputs, target = rows(context.outputs()), rows(context.target)
    matrix, bias = ridge(inputs, target - inputs, position_weights(target), STRENGTH)
    width = inputs.shape[1]
    part = nn.utils.skip_init(Patch, width, width).requires_grad_(False).eval()
    part.weight, part.bias = frozen(matrix), frozen(bias)
    block = context.draft.blocks[carrier]
    block.add_module(PATCH, part)
    context.draft.forget(f"{carrier}.{PATCH}")
    context.draft.changed |= {f"{carrier}.{PATCH}.weight", f"{carrier}.{PATCH}.bias"}
