"""Closed-form healing that costs some bytes: the mean of what leaves a stretch becomes the full model's."""

from typing import Any

from torch import Tensor, nn

from offsite.emulator.calibration.draft import Station
from offsite.emulator.calibration.least_squares import centred, rows, weighted_error
from offsite.emulator.compressors.arguments import no_argument
from offsite.emulator.compressors.pairs import pairs_of


def center(station: Station, argument: str) -> None:
    """Moves the bias of a feed-forward network's last layer by the mean error; keeps it where the error fell.

    Rounding shifts what a layer gives on the whole, and later layers take a shift for a signal (Nagel et al. 2019,
    section 4.2). Codes that were chosen before stay as they are, so write it behind a quantiser.
    """
    no_argument("center", argument)
    pairs = pairs_of(station)
    if not pairs:
        return
    path = pairs[-1].down
    target, outputs = rows(station.target), rows(station.outputs())
    layer: Any = station.span.module(path)
    before = getattr(layer, "bias", None)
    _set_bias(station, path, centred(before, target, outputs))
    if weighted_error(target, rows(station.outputs())) > weighted_error(target, outputs):
        _set_bias(station, path, before)


def _set_bias(station: Station, path: str, bias: Tensor | None) -> None:
    """Gives a layer another bias, or none, and leaves its weight and the storage of it as they are."""
    layer: Any = station.span.module(path)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    station.span.changed.add(f"{path}.bias")
