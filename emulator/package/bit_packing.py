"""Codes of a few bits side by side in bytes, the earlier codes in the lower bits."""

import torch
from torch import Tensor

from offsite.emulator.package.quantization_scheme import LANES


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


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """Returns the first `count` codes, uint8 (count,): the inverse of `pack`."""
    if bits == 8:
        return packed
    if bits == 4:  # the general way below takes four times as long, and most emulators widen 4-bit weights at each step
        return torch.stack([packed & 15, packed >> 4], dim=1).reshape(-1)[:count]
    together, size = LANES[bits]
    full = packed.reshape(-1, size).to(torch.int32)
    word = sum((full[:, i] << (8 * i) for i in range(size)), torch.zeros_like(full[:, 0]))
    codes = [(word >> (bits * i) & (2**bits - 1)).to(torch.uint8) for i in range(together)]
    return torch.stack(codes, dim=1).reshape(-1)[:count]
