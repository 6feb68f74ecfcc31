"""Weights in memory-mapped files: which tensors lie there, and how their pages are given back to the system.

Loading safetensors on the CPU maps the file, so weights in the file's own dtype take no memory of their own. Pages that
were read count as resident until they are given back. The next access reads them again, from the system's page cache
where it still holds them.
"""

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from offsite.task.device import CPU

_MAPS = Path("/proc/self/maps")


@dataclass(frozen=True)
class MappedWeights:
    """Some weights that lie in mapped files, and are never written.

    The tensors keep their mapping alive, so their addresses belong to the file as long as this object lives.

    Attributes:
      tensors: views of the weights, each wholly inside a private mapping of a file.
    """

    tensors: tuple[Tensor, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def give_back(self) -> None:
        """Gives the pages of all tensors back to the system; their values stay, since the file holds them."""
        for tensor in self.tensors:
            # Whole pages only: the rest of the outer two may belong to other tensors.
            first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                _madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def mapped_weights(tensors: Iterable[Tensor]) -> MappedWeights:
    """Returns those of some tensors that lie in mapped files; none where the system does not tell, as only Linux does.

    A mapping that was written to holds other values than its file; the caller names tensors that nothing writes to.
    """
    if not sys.platform.startswith("linux"):
        return MappedWeights()
    ranges = _file_ranges()
    starts = [start for start, _ in ranges]
    found = []
    for tensor in tensors:
        if tensor.device.type == CPU and tensor.is_contiguous() and tensor.numel():
            where = bisect_right(starts, tensor.data_ptr()) - 1
            if where >= 0 and tensor.data_ptr() + tensor.numel() * tensor.element_size() <= ranges[where][1]:
                found.append(tensor.detach())
    return MappedWeights(tuple(found))


def _file_ranges() -> list[tuple[int, int]]:
    """Returns the addresses of this process' private mappings of safetensors files, ascending."""
    ranges = []
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, flags, _, _, inode, *name = line.split(maxsplit=5)
        if flags.endswith("p") and inode != "0" and name and name[0].endswith(".safetensors"):
            start, _, end = addresses.partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    return sorted(ranges)


def _madvise(start: ctypes.c_void_p, length: ctypes.c_size_t, advice: int) -> None:
    """Calls madvise(2); Python's own covers only mappings that Python made. A refusal changes nothing but memory."""
    ctypes.CDLL(None).madvise(start, length, advice)
