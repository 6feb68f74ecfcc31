"""A tensor in its stored form, of which any rows can be widened alone; the whole is never in memory as float32.

Widening is exact: the rows of a form are the same bits as the rows of the tensor that `storage.decode` returns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Self

import torch
from torch import Tensor

from offsite.emulator.package.bit_packing import Room, fresh
from offsite.emulator.package.quantization_scheme import Scheme
from offsite.emulator.package.quantize import Quantised, dequantize

BLOCK = 1 << 22  # numbers that are widened at once where a tensor is read in blocks: 16 MB in float32
TOGETHER = 8  # rows; the codes of so many rows begin and end at whole bytes in every scheme


@dataclass(frozen=True, eq=False)
class StoredWeight(ABC):
    """A frozen tensor of at least two dimensions in a form that is narrower than float32.

    Attributes:
      shape: shape of the tensor in the model; "rows" below is its first dimension.
      dtype: floating dtype in which the tensor runs.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def rows(self, index: slice | Tensor, room: Room = fresh) -> Tensor:
        """Returns some rows, float32 (n, ...).

        Args:
          index: numbers of rows, int64 (n,), or a slice that begins at a multiple of `TOGETHER`.
          room: function that gives memory, see `bit_packing.Room`.
        """

    @property
    def size(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.numel() * piece.element_size() for piece in self._pieces().values())

    @property
    def device(self) -> torch.device:
        """Device on which the pieces lie, and rows are widened."""
        return next(iter(self._pieces().values())).device

    def widened(self, dtype: torch.dtype, room: Room = fresh) -> Tensor:
        """Returns the whole tensor in a floating dtype; `room` as for `rows`."""
        if dtype == torch.float32:
            return self.rows(slice(0, self.shape[0]), room)
        whole = room(prod(self.shape), dtype, self.device).view(self.shape)
        for where, part in self.blocks(room):
            whole[where] = part
        return whole

    def blocks(self, room: Room = fresh) -> Iterator[tuple[slice, Tensor]]:
        """Yields all rows in order, as (their place, float32 (n, ...)), some 16 MB at a time; `room` as for `rows`."""
        step = max(BLOCK // max(prod(self.shape[1:]), 1) // TOGETHER, 1) * TOGETHER
        for start in range(0, self.shape[0], step):
            where = slice(start, min(start + step, self.shape[0]))
            yield where, self.rows(where, room)

    def to(self, device: torch.device) -> Self:
        """Returns the weight on a device: itself if it lies there."""
        moved = {name: piece.to(device) for name, piece in self._pieces().items()}
        return self if all(moved[name] is piece for name, piece in self._pieces().items()) else replace(self, **moved)

    def _pieces(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, eq=False)
class Verbatim(StoredWeight):
    """A tensor that is held in 16 bits.

    Attributes:
      values: the tensor itself, bf16 or fp16.
    """

    values: Tensor

    def rows(self, index: slice | Tensor, room: Room = fresh) -> Tensor:
        """Returns some rows, see `StoredWeight.rows`."""
        chosen = self.values[index]
        return room(chosen.numel(), torch.float32, chosen.device).view(chosen.shape).copy_(chosen)

    def widened(self, dtype: torch.dtype, room: Room = fresh) -> Tensor:
        """Returns the whole tensor in a floating dtype: without a copy in its own."""
        return self.values if dtype == self.values.dtype else super().widened(dtype, room)


@dataclass(frozen=True, eq=False)
class Codes(StoredWeight):
    """A quantised tensor.

    Attributes:
      scheme: the scheme of the codes.
      codes, scales, minima, spans: see `quantize.Quantised`.
    """

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    minima: Tensor
    spans: Tensor | None = None

    def rows(self, index: slice | Tensor, room: Room = fresh) -> Tensor:
        """Returns some rows, see `StoredWeight.rows`."""
        whole = Quantised(self.codes, self.scales, self.minima, self.spans)
        if isinstance(index, slice) and (index.start or 0) == 0 and index.stop == self.shape[0]:
            return dequantize(whole, self.shape, self.scheme, room)
        part = whole.rows(index, self.shape, self.scheme)
        count = index.stop - index.start if isinstance(index, slice) else len(index)
        return dequantize(part, (count, *self.shape[1:]), self.scheme, room)


@dataclass(frozen=True, eq=False)
class Pieces(StoredWeight):
    """A tensor of which no row can be made alone, for example one without its zeros.

    Attributes:
      first, second: stored tensors, of any dtypes.
      widen: function that makes the tensor of the two, float32.
    """

    first: Tensor
    second: Tensor
    widen: Callable[[Tensor, Tensor], Tensor]

    def rows(self, index: slice | Tensor, room: Room = fresh) -> Tensor:
        """Returns some rows, see `StoredWeight.rows`; the whole tensor exists for a moment."""
        return self.widen(self.first, self.second)[index]
