"""Finds the dense layers that make a feed-forward network in a block: by their effects, never by their names."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite.emulator.calibration.draft import SegmentContext
from offsite.emulator.structure.replacements import LowRank, input_columns, output_rows, spec_of, weight_of
from offsite.errors import ConfigError, UnsupportedModel


@dataclass(frozen=True)
class LayerPair:
    """Layers whose output rows are the input columns of another layer, channel by channel.

    Attributes:
      ups: path of each layer that makes the channels, with its number of rows for each channel: 2 if gate and partner
        are one layer.
      down: path of the layer that reads the channels.
    """

    ups: tuple[tuple[str, int], ...]
    down: str


def pairs_of(context: SegmentContext) -> list[LayerPair]:
    """Returns the feed-forward networks of a segment's running block; [] if the block runs on another's weights.

    Of blocks with the same layers, only the first is searched.

    Raises:
      UnsupportedModel: the block has no such network, as in a mixture whose experts are one stacked tensor.
    """
    layers = context.draft.layers()
    if not layers:
        return []
    head = str(context.draft.segment.head)
    key = tuple(f"{path[len(head) :]} {spec_of(layer)}" for path, layer in layers.items())
    known = context.middle.pairs
    if key not in known:
        pairs = [pair for down in layers if (pair := _pair(context, layers, down)) is not None]
        known[key] = [(tuple((path[len(head) :], times) for path, times in p.ups), p.down[len(head) :]) for p in pairs]
    if not known[key]:
        raise UnsupportedModel(
            f"block={head}: no feed-forward network of dense layers was found in it; use lowrank, skip_importance or "
            "gptq4 instead"
        )
    return [LayerPair(tuple((head + up, times) for up, times in ups), head + down) for ups, down in known[key]]


def dense_pairs(name: str, context: SegmentContext) -> list[LayerPair]:
    """Returns `pairs_of` for a compressor that fits dense layers; a low-rank layer would grow again by the fit.

    Args:
      name: name of the compressor, for the message.
      context: the segment with its examples.

    Raises:
      ConfigError: a layer is of low rank already; the message names the order that works.
      UnsupportedModel: the block has no feed-forward network, as for `pairs_of`.
    """
    pairs = pairs_of(context)
    paths = {path for pair in pairs for path in (pair.down, *(up for up, _ in pair.ups))}
    if any(isinstance(context.draft.module(path), LowRank) for path in paths):
        raise ConfigError(f"{name} after lowrank: the thin layers would become dense again; write {name} first")
    return pairs


def _pair(context: SegmentContext, layers: dict[str, nn.Module], down: str) -> LayerPair | None:
    """Returns the pair of a layer, if other layers' rows move single columns of its input, in any order.

    Values of attention are such rows, too, but they reach other positions and belong to a head. Only in a feed-forward
    network does each position keep to itself, and can the channels of all layers be reversed together without a change
    of the block's output. Reversal alone is no proof: heads that all attend evenly can be exchanged as well.
    """
    width = weight_of(layers[down]).shape[1]
    sizes = {path: len(weight_of(layer)) for path, layer in layers.items() if path != down}
    candidates = {path: size // width for path, size in sizes.items() if size in (width, 2 * width)}
    if not candidates or width < 2:
        return None
    before, result = _entering(context, layers[down])
    if len(before) != result.numel() // result.shape[-1]:
        return None  # the layer does not read positions but, for example, a step of noise
    ups = []
    for path, times in candidates.items():
        reached = {_reached(context, layers[path], layers[down], before, part * width) for part in range(times)}
        if reached == {True} and _one_position(context, layers[path], layers[down], before):
            ups.append((path, times))
    if not ups:
        return None
    with _turned(layers, tuple(ups), down):
        other = _entering(context, layers[down])[1]
    same = torch.allclose(other, result, rtol=1e-3, atol=1e-4 * float(result.abs().max()))
    return LayerPair(tuple(ups), down) if same else None


def _reached(context: SegmentContext, up: nn.Module, down: nn.Module, before: Tensor, row: int) -> bool:
    """Returns whether a row of `up` moves the first column of the inputs of `down`, and no other column."""
    with _moved(up, row):
        moved = (_entering(context, down)[0] - before).abs().amax(0)
    return bool(moved[0] > 0) and not moved[1:].any()


def _one_position(context: SegmentContext, up: nn.Module, down: nn.Module, before: Tensor) -> bool:
    """Returns whether one position of the outputs of `up` moves this position of the inputs of `down`, and no other.

    The position is the first of which `down` reads anything: a padding token may give zeros, which no gate lets pass.
    Later positions of the same example would follow it through any attention.
    """
    place = int(before.any(-1).int().argmax())

    def moved(module: nn.Module, args: object, output: Tensor) -> Tensor:
        flat = output.reshape(-1, output.shape[-1]).clone()
        flat[place : place + 1] = flat[place : place + 1] * 2 + 0.5
        return flat.reshape(output.shape)

    handle = up.register_forward_hook(moved)
    try:
        after = _entering(context, down)[0]
    finally:
        handle.remove()
    return (after != before).any(-1).nonzero().flatten().tolist() == [place]


@contextmanager
def _turned(layers: dict[str, nn.Module], ups: tuple[tuple[str, int], ...], down: str) -> Iterator[None]:
    """Reverses the order of a network's channels within the context."""
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


def _entering(context: SegmentContext, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns a layer's inputs, (positions, in), and its block's output, both of the first call."""
    head = str(context.draft.segment.head)
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    try:
        with torch.no_grad():
            result = next(context.stream.each(context.draft.blocks[head], head, context.inputs))
    finally:
        handle.remove()
    return seen[0], result


@contextmanager
def _moved(layer: nn.Module, channel: int) -> Iterator[None]:
    """Changes one row of a layer's weight within the context."""
    row = output_rows(layer)[channel]
    saved = row.clone()
    row.mul_(2).add_(0.5)
    try:
        yield
    finally:
        row.copy_(saved)
