"""Codes of a few bits side by side in bytes, the earlier codes in the lower bits."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from offsite.emulator.package.quantization_scheme import LANES, packed_bytes

# (count, dtype, device) -> memory for so many numbers, (count,), whatever they are now.
Room = Callable[[int, torch.dtype, torch.device], Tensor]


def fresh(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns memory of its own."""
    return torch.empty(count, dtype=dtype, device=device)


class Scratch(threading.local):
    """Memory that each call takes over from the call before, in each thread by itself.

    A layer that makes its weight anew for one product needs the memory only so long. Taken from the system each time,
    the pieces, of many sizes and between activations that stay, leave holes that double what a step takes.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Room`; what an earlier call returned is overwritten."""
        held = self._held.get((dtype, device))
        if held is None or held.numel() < count:
            self._held.pop((dtype, device), None)
            held = self._held[dtype, device] = fresh(count, dtype, device)
        return held[:count]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Returns codes without the bits that are always 0, uint8; the last bytes are filled up with 0.

    Args:
      codes: unpacked codes, uint8 (count,), each below 2**bits.
      bits: width of a code: 3 (eight codes in three bytes), 4 (two in a byte), 6 (four in three bytes) or 8 (one each).
    """
    if bits == 8:
        return codes.contiguous()
    together, size = LANES[bits]
    full = torch.cat([codes, codes.new_zeros(-codes.numel() % together)]).reshape(-1, together).to(torch.int32)
    word = sum((full[:, i] << (bits * i) for i in range(together)), torch.zeros_like(full[:, 0]))
    return torch.stack([(word >> (8 * i) & 255).to(torch.uint8) for i in range(size)], dim=1).reshape(-1)


def unpack(packed: Tensor, count: int, bits: int, room: Room = fresh) -> Tensor:
    """Returns the first `count` codes, uint8 (count,): the inverse of `pack`.

    Args:
      packed: packed codes.
      count: number of codes.
      bits: width of a code.
      room: function that gives memory, see `Room`.
    """
    if bits == 8:
        return packed
    if bits == 4:  # the general way below takes four times as long, and most emulators widen 4-bit weights at each step
        codes = room(2 * packed.numel(), torch.uint8, packed.device).view(-1, 2)
        torch.bitwise_and(packed, 15, out=codes[:, 0])
        torch.bitwise_right_shift(packed, 4, out=codes[:, 1])
        return codes.view(-1)[:count]
    together, size = LANES[bits]
    full = packed.reshape(-1, size).to(torch.int32)
    word = sum((full[:, i] << (8 * i) for i in range(size)), torch.zeros_like(full[:, 0]))
    parts = [(word >> (bits * i) & (2**bits - 1)).to(torch.uint8) for i in range(together)]
    return torch.stack(parts, dim=1).reshape(-1)[:count]


def packed_rows(packed: Tensor, index: slice | Tensor, shape: tuple[int, int], bits: int) -> Tensor:
    """Returns the packed codes of some rows of a packed matrix, uint8.

    Args:
      packed: packed codes of all rows, one row behind the other.
      index: numbers of rows, int64 (n,), or a slice that begins at a multiple of 8, where a byte begins in every width.
      shape: rows and columns of the matrix.
      bits: width of a code.
    """
    rows, columns = shape
    together, size = LANES[bits]
    if isinstance(index, slice):
        first = index.start * columns // together * size
        return packed[first : first + packed_bytes((index.stop - index.start) * columns, bits)]
    if columns % together == 0:
        return packed.reshape(rows, -1)[index].reshape(-1)
    return pack(unpack(packed, rows * columns, bits).reshape(rows, columns)[index].reshape(-1), bits)
