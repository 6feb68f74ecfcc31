"""Group-wise asymmetric weight quantisation: pure functions between a tensor and small integer codes.

A weight becomes `minimum + scale * code` with one minimum and one scale per group of consecutive inputs, fp16 or fine:
4 bits and a group of 64 cost 4 + 32/64 = 4.5 bits per weight; with fine grids a group of 32 costs 4 + 12/32 bits per
weight, and 32 bits for each row. Minima are rounded down and scales up, so that no weight lies outside its group's grid
and every error is at most half a scale.
"""

from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from offsite.emulator.package.bit_packing import Room, fresh, pack, packed_rows, unpack
from offsite.emulator.package.quantization_scheme import FINE_BITS, Scheme, packed_bytes
from offsite.errors import RangeError

HALF = torch.float16
FINEST = 2**FINE_BITS - 1


@dataclass(frozen=True)
class Grid:
    """The points to which each group is rounded; `rows` is a tensor's first dimension.

    Attributes:
      minima: lowest point of each group, float32 (rows, groups).
      scales: distance between neighbouring points, >= 0, float32 (rows, groups).
      fine: the codes of scales and minima in a fine scheme; None if both are fp16 numbers.
    """

    minima: Tensor
    scales: Tensor
    fine: "Fine | None" = None


@dataclass(frozen=True)
class Fine:
    """Scales and minima as multiples of two units for each row: scale = unit 0 * code, minimum = -unit 1 * code.

    Attributes:
      scales: codes of the scales, uint8 (rows, groups), each below 64.
      minima: codes of the minima, uint8 (rows, groups), each below 64.
      spans: the two units of each row, fp16 (rows, 2), >= 0.
    """

    scales: Tensor
    minima: Tensor
    spans: Tensor

    def grid(self) -> Grid:
        """Returns the grid; a 6-bit multiple of an fp16 number is exact in float32."""
        step, drop = (unit.float().unsqueeze(-1) for unit in self.spans.unbind(-1))
        return Grid(-drop * self.minima.float(), step * self.scales.float(), self)


@dataclass(frozen=True)
class Quantised:
    """A tensor as codes; `rows` below is the tensor's first dimension and `columns` the product of the others.

    Attributes:
      codes: packed codes of all (rows * columns,) weights, uint8.
      scales: scales, fp16 (rows, ceil(columns / group)), >= 0; in a fine scheme their packed 6-bit codes, uint8.
      minima: minima of any sign, in the same form as `scales`.
      spans: the two units of each row in a fine scheme, fp16 (rows, 2); else None.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor
    spans: Tensor | None = None

    @classmethod
    def of(cls, codes: Tensor, grid: Grid, bits: int) -> "Quantised":
        """Returns a tensor's packed form: codes (rows * columns,), uint8, on a grid."""
        packed, fine = pack(codes, bits), grid.fine
        if fine is None:
            return cls(packed, grid.scales.to(torch.float16), grid.minima.to(torch.float16))
        scales, minima = (pack(side.reshape(-1), FINE_BITS) for side in (fine.scales, fine.minima))
        return cls(packed, scales, minima, fine.spans)

    @property
    def pieces(self) -> tuple[Tensor, ...]:
        """The stored tensors, in the order of `Scheme.pieces`."""
        return tuple(piece for piece in (self.codes, self.scales, self.minima, self.spans) if piece is not None)

    def rows(self, index: slice | Tensor, shape: tuple[int, ...], scheme: Scheme) -> "Quantised":
        """Returns the packed form of some rows of the tensor, whose shape and scheme are given.

        Args:
          index: numbers of rows, int64 (n,), or a slice that begins at a multiple of 8.
          shape: shape of the whole tensor.
          scheme: scheme of the tensor.
        """
        columns, groups = prod(shape[1:]), ceil(prod(shape[1:]) / scheme.group)
        codes = packed_rows(self.codes, index, (shape[0], columns), scheme.bits)
        if self.spans is None:
            return Quantised(codes, self.scales[index], self.minima[index])
        grids = (shape[0], groups)
        scales, minima = (packed_rows(side, index, grids, FINE_BITS) for side in (self.scales, self.minima))
        return Quantised(codes, scales, minima, self.spans[index])

    def grid(self, shape: tuple[int, ...], scheme: Scheme) -> Grid:
        """Returns the grid of the tensor, whose shape and scheme are given.

        Raises:
          RangeError: a stored piece does not have the shape and dtype that the tensor's shape asks for.
        """
        rows, groups = shape[0], ceil(prod(shape[1:]) / scheme.group)
        self._check(shape, scheme, rows, groups)
        if self.spans is None:
            return Grid(self.minima.float(), self.scales.float())
        scales, minima = (
            unpack(side, rows * groups, FINE_BITS).reshape(rows, -1) for side in (self.scales, self.minima)
        )
        return Fine(scales, minima, self.spans).grid()

    def _check(self, shape: tuple[int, ...], scheme: Scheme, rows: int, groups: int) -> None:
        sides = ((packed_bytes(rows * groups, FINE_BITS),), torch.uint8) if scheme.fine else ((rows, groups), HALF)
        expected = [((packed_bytes(prod(shape), scheme.bits),), torch.uint8), sides, sides]
        expected += [((rows, 2), HALF)] if scheme.fine else []
        if [(tuple(piece.shape), piece.dtype) for piece in self.pieces] != expected:
            raise RangeError(f"shape={shape}: the stored codes, scales and minima do not belong to it; build again")


def quantize(weight: Tensor, scheme: Scheme) -> Quantised:
    """Returns the codes of a floating-point tensor of at least two dimensions.

    Args:
      weight: tensor (rows, ...), finite, within +-65504, of any floating dtype; a row is all but the first dimension.
      scheme: bits, group and kind of scales; the last group of a row may be smaller.

    Raises:
      RangeError: a weight is not finite, or a group does not fit fp16.
    """
    rows, columns = weight.shape[0], prod(weight.shape[1:])
    flat = weight.detach().reshape(rows, columns).to(torch.float32)
    groups = grouped(flat, scheme.group)
    grid = covering(groups, scheme)
    codes = nearest(groups, grid, scheme.bits).to(torch.uint8)
    return Quantised.of(codes.reshape(rows, -1)[:, :columns].reshape(-1), grid, scheme.bits)


def dequantize(quantised: Quantised, shape: tuple[int, ...], scheme: Scheme, room: Room = fresh) -> Tensor:
    """Returns the fp32 tensor of a shape; every step but one fp32 addition is exact, so it is equal on every machine.

    Args:
      quantised: the tensor's packed form.
      shape: shape of the tensor.
      scheme: scheme of the tensor.
      room: function that gives memory, see `bit_packing.Room`.

    Raises:
      RangeError: a stored piece does not have the shape and dtype that the tensor's shape asks for.
    """
    grid = quantised.grid(shape, scheme)
    rows, columns, groups = shape[0], prod(shape[1:]), grid.scales.shape[1]
    codes = unpack(quantised.codes, rows * columns, scheme.bits, room).reshape(rows, columns)
    weight = room(rows * groups * scheme.group, torch.float32, codes.device).view(rows, groups * scheme.group)
    weight[:, :columns] = codes  # a row's last group may be shorter; what lies behind it is of no account
    weight.view(rows, groups, scheme.group).mul_(grid.scales.unsqueeze(-1)).add_(grid.minima.unsqueeze(-1))
    return weight[:, :columns].reshape(shape)


def grouped(flat: Tensor, group: int) -> Tensor:
    """Returns (rows, columns) as (rows, groups, group); the last input fills up, which moves no minimum or maximum."""
    rows, columns = flat.shape
    groups = ceil(columns / group)
    return torch.cat([flat, flat[:, -1:].expand(rows, groups * group - columns)], dim=1).reshape(rows, groups, group)


def nearest(groups: Tensor, grid: Grid, bits: int) -> Tensor:
    """Returns the codes of the points nearest to weights, float32 (rows, groups, group) as the weights."""
    low, step = grid.minima.unsqueeze(-1), grid.scales.unsqueeze(-1)
    return ((groups - low) / torch.where(step == 0, 1.0, step)).round().clamp(0, 2**bits - 1)


def covering(groups: Tensor, scheme: Scheme) -> Grid:
    """Returns the grid whose range minimum..minimum + levels * scale covers each group of (rows, groups, group).

    Raises:
      RangeError: a weight is not finite, or a group does not fit fp16.
    """
    low, high = (extreme.to(torch.float64) for extreme in (groups.amin(-1), groups.amax(-1)))
    levels = 2**scheme.bits - 1
    if scheme.fine:
        grid = _fine(low, high, levels)
    else:
        minima = half(low, -torch.inf).double()
        grid = Grid(minima.float(), half((high - minima) / levels, torch.inf).float())
    if not (torch.isfinite(grid.minima).all() and torch.isfinite(grid.scales).all()):
        raise RangeError("weight group outside +-65504 or not finite: its scale does not fit fp16; ship it verbatim")
    return grid


def half(values: Tensor, direction: float) -> Tensor:
    """Returns float64 values as fp16; a value that fp16 does not hold is rounded towards `direction`, -inf or inf."""
    rounded = values.to(HALF)
    wrong = rounded.double() > values if direction < 0 else rounded.double() < values
    return torch.where(wrong, torch.nextafter(rounded, torch.full_like(rounded, direction)), rounded)


def _fine(low: Tensor, high: Tensor, levels: int) -> Grid:
    """Returns the fine grid that covers low..high, both float64 (rows, groups); each group's range always holds 0."""
    drop = half((-low).clamp_min(0).amax(-1, keepdim=True) / FINEST, torch.inf)
    minima = _multiples((-low).clamp_min(0), drop)
    wanted = (high.clamp_min(0) + drop.double() * minima) / levels
    step = half(wanted.amax(-1, keepdim=True) / FINEST, torch.inf)
    scales = _multiples(wanted, step)
    return Fine(scales.to(torch.uint8), minima.to(torch.uint8), torch.cat([step, drop], dim=-1)).grid()


def _multiples(values: Tensor, unit: Tensor) -> Tensor:
    """Returns the smallest multiples of a unit that reach the values, float64 (rows, groups), at most 63."""
    return (values / torch.where(unit == 0, 1.0, unit.double())).ceil().clamp(0, FINEST)
