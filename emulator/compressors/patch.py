"""Closed-form healing: a linear map in the place of blocks that are left out."""

from torch import nn

from offsite.emulator.calibration.draft import Station
from offsite.emulator.calibration.least_squares import position_weights, ridge, rows
from offsite.emulator.compressors.arguments import no_argument
from offsite.emulator.structure.replacements import PATCH, Patch

STRENGTH = 1e-4


def patch(station: Station, argument: str) -> None:
    """Puts the best linear map in the place of the blocks that are left out; changes nothing where there are none.

    The linear replacement of blocks is ReplaceMe's (Shopkhoev et al. 2025); here it maps what really arrives there in
    the emulator.
    """
    no_argument("patch", argument)
    carrier = station.span.carrier
    if carrier is None:
        return
    inputs, target = rows(station.outputs()), rows(station.target)
    matrix, bias = ridge(inputs, target - inputs, position_weights(target), STRENGTH)
    width = inputs.shape[1]
    part = nn.utils.skip_init(Patch, width, width).requires_grad_(False).eval()
    part.weight.data, part.bias.data = matrix, bias
    block = station.span.blocks[carrier]
    block.add_module(PATCH, part)
    station.span.forget(f"{carrier}.{PATCH}")
    station.span.changed |= {f"{carrier}.{PATCH}.weight", f"{carrier}.{PATCH}.bias"}
