"""Closed-form healing that costs some bytes: the mean of what leaves a stretch becomes the full model's."""

from torch import nn

from emulator.compressors.arguments import no_argument
from emulator.compressors.pairs import pairs_of
from emulator.draft import Station
from emulator.fit import position_weights, rows
from emulator.parts import dense_like, weight_of


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
    target = rows(station.target)
    weights = position_weights(target).unsqueeze(-1)
    error = target - rows(station.outputs())
    shift = (weights * error).sum(0) / weights.sum()
    layer = station.span.module(path)
    bias = getattr(layer, "bias", None)
    _swap(station, path, dense_like(layer, weight_of(layer), shift if bias is None else bias + shift))
    if (weights * (target - rows(station.outputs())).square()).sum() > (weights * error.square()).sum():
        _swap(station, path, layer)


def _swap(station: Station, path: str, layer: nn.Module) -> None:
    """Puts a layer of the same weight in the place of another, and leaves the storage of the weight as it is."""
    name, span = f"{path}.weight", station.span
    storage, pieces, changed = span.storage.get(name), span.pieces.get(name), name in span.changed
    span.replace(path, layer)
    if storage is not None:
        span.storage[name] = storage
    if pieces is not None:
        span.pieces[name] = pieces
    if not changed:
        span.changed.discard(name)
