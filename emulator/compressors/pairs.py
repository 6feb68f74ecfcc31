"""Which dense layers of a block make a feed-forward network: found by what they do, never by their names."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite.emulator.calibration.draft import Station
from offsite.emulator.structure.replacements import LowRank, input_columns, output_rows, spec_of, weight_of
from offsite.errors import ConfigError, UnsupportedModel


@dataclass(frozen=True)
class LayerPair:
    """Layers whose output rows are the input columns of another, channel by channel.

    Attributes:
      ups: path of each layer that makes the channels, and how many rows of it make one: 2 where gate and partner are
        one layer.
      down: path of the layer that reads them.
    """

    ups: tuple[tuple[str, int], ...]
    down: str


def pairs_of(station: Station) -> list[LayerPair]:
    """Returns the feed-forward networks of a stretch's running block; none where its weights are another's.

    Blocks of the same layers are tried once.

    Raises:
      UnsupportedModel: it has none, as a mixture of experts whose experts are one stacked tensor.
    """
    layers = station.span.layers()
    if not layers:
        return []
    head = str(station.span.stretch.head)
    key = tuple(f"{path[len(head) :]} {spec_of(layer)}" for path, layer in layers.items())
    known = station.middle.pairs
    if key not in known:
        found = [pair for down in layers if (pair := _pair(station, layers, down)) is not None]
        known[key] = [(tuple((path[len(head) :], times) for path, times in p.ups), p.down[len(head) :]) for p in found]
    if not known[key]:
        raise UnsupportedModel(
            f"block={head}: no feed-forward network of dense layers was found in it; use lowrank, skip_importance or "
            "gptq4 instead"
        )
    return [LayerPair(tuple((head + up, times) for up, times in ups), head + down) for ups, down in known[key]]


def dense_pairs(name: str, station: Station) -> list[LayerPair]:
    """Returns `pairs_of` for a compressor that fits their layers; one that is two thin ones already would grow again.

    Raises:
      ConfigError: a layer is of low rank already; names the order that works.
      UnsupportedModel: as for `pairs_of`.
    """
    pairs = pairs_of(station)
    paths = {path for pair in pairs for path in (pair.down, *(up for up, _ in pair.ups))}
    if any(isinstance(station.span.module(path), LowRank) for path in paths):
        raise ConfigError(f"{name} after lowrank: the thin layers would become dense again; write {name} first")
    return pairs


def _pair(station: Station, layers: dict[str, nn.Module], down: str) -> LayerPair | None:
    """Tries which layers' rows move one column of what `down` reads, and whether the channels have no order.

    Values of attention are such rows, too, but they belong to a head: only in a feed-forward network those of all
    layers can be turned round together and the block gives the same.
    """
    width = weight_of(layers[down]).shape[1]
    sizes = {path: len(weight_of(layer)) for path, layer in layers.items() if path != down}
    candidates = {path: size // width for path, size in sizes.items() if size in (width, 2 * width)}
    if not candidates or width < 2:
        return None
    before, result = _entering(station, layers[down])
    if len(before) != result.numel() // result.shape[-1]:
        return None  # it reads something else than positions, as a step of noise
    ups = []
    for path, times in candidates.items():
        reached = {_reached(station, layers[path], layers[down], before, part * width) for part in range(times)}
        if reached == {True}:
            ups.append((path, times))
    if not ups:
        return None
    with _turned(layers, tuple(ups), down):
        other = _entering(station, layers[down])[1]
    same = torch.allclose(other, result, rtol=1e-3, atol=1e-4 * float(result.abs().max()))
    return LayerPair(tuple(ups), down) if same else None


def _reached(station: Station, up: nn.Module, down: nn.Module, before: Tensor, row: int) -> bool:
    """Returns whether a row of one layer moves the first column of what another reads, and no other column."""
    with _moved(up, row):
        moved = (_entering(station, down)[0] - before).abs().amax(0)
    return bool(moved[0] > 0) and not moved[1:].any()


@contextmanager
def _turned(layers: dict[str, nn.Module], ups: tuple[tuple[str, int], ...], down: str) -> Iterator[None]:
    """Within it the channels of a network stand in reversed order."""
    tables = [input_columns(layers[down]).T]
    for path, times in ups:
        own = [output_rows(layers[path])]
        if (bias := getattr(layers[path], "bias", None)) is not None:
            own.append(bias.data)
        tables += [part for table in own for part in table.chunk(times)]
    saved = [table.clone() for table in tables]
    try:
        for table, old in zip(tables, saved, strict=True):
            table.copy_(old.flip(0))
        yield
    finally:
        for table, old in zip(tables, saved, strict=True):
            table.copy_(old)


def _entering(station: Station, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns what enters a layer, (positions, in), and what leaves its block, both of the first call."""
    head = str(station.span.stretch.head)
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    try:
        with torch.no_grad():
            result = next(station.stream.each(station.span.blocks[head], head, station.inputs))
    finally:
        handle.remove()
    return seen[0], result


@contextmanager
def _moved(layer: nn.Module, channel: int) -> Iterator[None]:
    """Within it one row of a layer's weight is another."""
    row = output_rows(layer)[channel]
    saved = row.clone()
    row.mul_(2).add_(0.5)
    try:
        yield
    finally:
        row.copy_(saved)
