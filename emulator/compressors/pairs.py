"""Which dense layers of a block make a feed-forward network: found by what they do, never by their names."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emulator.draft import Station
from emulator.parts import weight_of
from errors import UnsupportedModel


@dataclass(frozen=True)
class Pair:
    """Layers whose output rows are the input columns of another, channel by channel.

    Attributes:
      ups: paths of the layers that make the channels: one, or a gate and its partner.
      down: path of the layer that reads them.
    """

    ups: tuple[str, ...]
    down: str


def pairs_of(station: Station) -> list[Pair]:
    """Returns the feed-forward networks of a stretch's running block; none where its weights are another's.

    Raises:
      UnsupportedModel: it has none, as a mixture of experts whose experts are one stacked tensor.
    """
    layers = station.span.layers()
    if not layers:
        return []
    found = [pair for down in layers if (pair := _pair(station, layers, down)) is not None]
    if not found:
        raise UnsupportedModel(
            f"block={station.span.stretch.head}: no feed-forward network of dense layers was found in it; use lowrank, "
            "skip_importance or gptq4 instead"
        )
    return found


def _pair(station: Station, layers: dict[str, nn.Module], down: str) -> Pair | None:
    """Tries whether moving one row of a layer moves one column of what `down` reads, and no other."""
    width = weight_of(layers[down]).shape[1]
    wide = width > weight_of(layers[down]).shape[0]  # attention reads no more channels than it writes
    candidates = [path for path, layer in layers.items() if path != down and weight_of(layer).shape[0] == width]
    if not (wide and candidates):
        return None
    before = _entering(station, layers[down])
    ups = []
    for path in candidates:
        with _moved(layers[path], channel=0):
            moved = (_entering(station, layers[down]) - before).abs().amax(0)
        if moved[1:].any():
            return None
        if moved[0] > 0:
            ups.append(path)
    return Pair(tuple(ups), down) if ups else None


def _entering(station: Station, layer: nn.Module) -> Tensor:
    """Returns what enters a layer for the first call's first examples, (positions, in)."""
    head = station.span.stretch.head
    assert head is not None  # noqa: S101 - a stretch with layers has a block that runs
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    try:
        with torch.no_grad():
            next(station.stream.each(station.span.blocks[head], head, station.inputs))
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def _moved(layer: nn.Module, *, channel: int) -> Iterator[None]:
    """Within it one row of a layer's weight is another."""
    row = weight_of(layer).data[channel]
    saved = row.clone()
    row.mul_(2).add_(0.5)
    try:
        yield
    finally:
        row.copy_(saved)
