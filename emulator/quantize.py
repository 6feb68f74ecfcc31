"""Group-wise asymmetric weight quantisation: pure functions between a tensor and small integer codes.

A weight becomes `minimum + scale * code` with one fp16 minimum and one fp16 scale per group of consecutive inputs:
4 bits and a group of 64 cost 4 + 32/64 = 4.5 bits per weight. The minimum is rounded down and the scale up, so that
no weight lies outside its group's grid and every error is at most half a scale.
"""

from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor
from torch.nn import functional

from errors import ConfigError, RangeError

BITS = (3, 4, 8)
LANES = {3: (8, 3), 4: (2, 1), 8: (1, 1)}  # codes that lie together, in how many bytes


@dataclass(frozen=True)
class Quantised:
    """A tensor as codes; `rows` below is the tensor's first dimension and `columns` the product of the others.

    Attributes:
      codes: uint8; with 8 bits (rows * columns,), with 4 bits two per byte (ceil(rows * columns / 2),), with 3 bits
        eight in three bytes (3 * ceil(rows * columns / 8),).
      scales: fp16 (rows, ceil(columns / group)), >= 0.
      minima: fp16, as `scales`.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor


def quantize(weight: Tensor, bits: int, group: int) -> Quantised:
    """Returns the codes of a floating-point tensor of at least two dimensions.

    Args:
      weight: (rows, ...) finite, within +-65504; any floating dtype. All but the first dimension are one row of inputs.
      bits: 3, 4 or 8.
      group: inputs that share a scale, >= 2; the last group of a row may be smaller.

    Raises:
      ConfigError: bits or group out of range.
      RangeError: a weight is not finite, or a group does not fit fp16.
    """
    _check(bits, group)
    rows, columns = weight.shape[0], prod(weight.shape[1:])
    groups = ceil(columns / group)
    flat = weight.detach().reshape(rows, columns).to(torch.float32)
    # Repeating the last input fills the last group without moving its smallest or largest member.
    padding = flat[:, -1:].expand(rows, groups * group - columns)
    grouped = torch.cat([flat, padding], dim=1).reshape(rows, groups, group)
    minima, scales = grid(grouped, 2**bits - 1)
    if not (torch.isfinite(minima).all() and torch.isfinite(scales).all()):
        raise RangeError("weight group outside +-65504 or not finite: its scale does not fit fp16; ship it verbatim")
    step = scales.float().unsqueeze(-1)
    steps = (grouped - minima.float().unsqueeze(-1)) / torch.where(step == 0, 1.0, step)
    codes = steps.round().clamp(0, 2**bits - 1).to(torch.uint8).reshape(rows, groups * group)[:, :columns].reshape(-1)
    return Quantised(pack(codes, bits), scales, minima)


def dequantize(quantised: Quantised, shape: tuple[int, ...], bits: int, group: int) -> Tensor:
    """Returns the fp32 tensor of a shape; exact in every step but one fp32 addition, so equal on every machine.

    Raises:
      ConfigError: bits or group out of range.
      RangeError: the stored pieces do not have the shapes and dtypes this shape asks for.
    """
    _check(bits, group)
    rows, columns = shape[0], prod(shape[1:])
    groups, count = ceil(columns / group), rows * columns
    expected = ((packed_bytes(count, bits),), (rows, groups), (rows, groups))
    pieces = (quantised.codes, quantised.scales, quantised.minima)
    if tuple(tuple(piece.shape) for piece in pieces) != expected or not _dtypes_fit(quantised):
        raise RangeError(f"shape={shape}: the stored codes, scales and minima do not belong to it; build again")
    flat = unpack(quantised.codes, count, bits).reshape(rows, columns)
    grouped = functional.pad(flat, (0, groups * group - columns)).reshape(rows, groups, group)
    weight = grouped.float() * quantised.scales.float().unsqueeze(-1) + quantised.minima.float().unsqueeze(-1)
    return weight.reshape(rows, groups * group)[:, :columns].reshape(shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Returns codes without the bits that are always 0, the earlier codes in the lower bits.

    Args:
      codes: uint8 (count,), each below 2**bits.
      bits: 8: as they are; 4: two in a byte; 3: eight in three bytes; what is missing at the end is 0.
    """
    if bits == 8:
        return codes.contiguous()
    together, size = LANES[bits]
    full = torch.cat([codes, codes.new_zeros(-codes.numel() % together)]).reshape(-1, together).to(torch.int32)
    word = sum((full[:, i] << (bits * i) for i in range(together)), torch.zeros_like(full[:, 0]))
    return torch.stack([(word >> (8 * i) & 255).to(torch.uint8) for i in range(size)], dim=1).reshape(-1)


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """Returns the first `count` codes, uint8, the inverse of `pack`."""
    if bits == 8:
        return packed
    together, size = LANES[bits]
    full = packed.reshape(-1, size).to(torch.int32)
    word = sum((full[:, i] << (8 * i) for i in range(size)), torch.zeros_like(full[:, 0]))
    codes = [(word >> (bits * i) & (2**bits - 1)).to(torch.uint8) for i in range(together)]
    return torch.stack(codes, dim=1).reshape(-1)[:count]


def packed_bytes(count: int, bits: int) -> int:
    """Returns how many bytes `pack` makes of `count` codes."""
    together, size = LANES[bits]
    return ceil(count / together) * size


def stored_bytes(shape: tuple[int, ...], bits: int, group: int) -> int:
    """Returns the bytes a quantised tensor takes: codes, scales and minima."""
    rows, columns = shape[0], prod(shape[1:])
    return packed_bytes(rows * columns, bits) + 2 * 2 * rows * ceil(columns / group)


def grid(grouped: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Returns fp16 (minima, scales) of (rows, groups, group) such that minimum..minimum + levels * scale covers it."""
    low, high = (extreme.to(torch.float64) for extreme in (grouped.amin(-1), grouped.amax(-1)))
    minima = low.to(torch.float16)
    minima = torch.where(minima.double() > low, torch.nextafter(minima, torch.full_like(minima, -torch.inf)), minima)
    scales = ((high - minima.double()) / levels).to(torch.float16)
    short = minima.double() + levels * scales.double() < high
    return minima, torch.where(short, torch.nextafter(scales, torch.full_like(scales, torch.inf)), scales)


def _dtypes_fit(quantised: Quantised) -> bool:
    halves = {quantised.scales.dtype, quantised.minima.dtype}
    return quantised.codes.dtype == torch.uint8 and halves == {torch.float16}


def _check(bits: int, group: int) -> None:
    if bits not in BITS or group < 2:
        raise ConfigError(
            f"bits={bits} group={group}: bits must be 3, 4 or 8 and group at least 2; use int4:64 or int8:64"
        )
