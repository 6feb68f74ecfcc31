"""Codes of a few bits side by side in bytes, the earlier codes in the lower bits."""

from math import ceil

import torch
from torch import Tensor

LANES = {3: (8, 3), 4: (2, 1), 6: (4, 3), 8: (1, 1)}  # codes that lie together, in how many bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Returns codes without the bits that are always 0.

    Args:
      codes: uint8 (count,), each below 2**bits.
      bits: 8: as they are; 6: four in three bytes; 4: two in a byte; 3: eight in three bytes; what is missing at the
        end is 0.
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
    if bits == 4:  # as below, in a quarter of the time: the weights of most emulators are widened so at every step
        return torch.stack([packed & 15, packed >> 4], dim=1).reshape(-1)[:count]
    together, size = LANES[bits]
    full = packed.reshape(-1, size).to(torch.int32)
    word = sum((full[:, i] << (8 * i) for i in range(size)), torch.zeros_like(full[:, 0]))
    codes = [(word >> (bits * i) & (2**bits - 1)).to(torch.uint8) for i in range(together)]
    return torch.stack(codes, dim=1).reshape(-1)[:count]


def packed_bytes(count: int, bits: int) -> int:
    """Returns how many bytes `pack` makes of `count` codes."""
    together, size = LANES[bits]
    return ceil(count / together) * size
