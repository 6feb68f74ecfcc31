"""A safetensors file written and read tensor by tensor, so that the emulator is never in memory as a whole.

The format is a length, a header in JSON and the tensors' bytes. The header comes first but is known last, so the bytes
wait in a second file until the header is known.
"""

import json
from math import prod
from pathlib import Path
from typing import BinaryIO, Self

import torch
from safetensors import safe_open
from torch import Tensor

from offsite.emulator.package.package_folder import tensor_sha256
from offsite.errors import DataError, MalformedMessage

# The format's names of dtypes.
NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8
PIECE = 1 << 20


class TensorFile:
    """A safetensors file while it is written.

    Args:
      path: path of the finished file; the waiting bytes lie in a file beside it.

    Raises:
      DataError: the disk does not take the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._waiting = path, path.with_suffix(".part")
        self._spool: BinaryIO = self._opened()
        self._entries: dict[str, tuple[str, list[int], int, int]] = {}
        self.hashes: dict[str, str] = {}
        self.sizes: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a contiguous tensor on the CPU."""
        content = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        start = self._spool.tell()
        self._write(memoryview(content))
        self._entries[name] = (NAMES[tensor.dtype], list(tensor.shape), start, content.nbytes)
        self.hashes[name], self.sizes[name] = tensor_sha256(tensor), content.nbytes

    def finish(self) -> None:
        """Writes the finished file; the same tensors give the same bytes, in whatever order they were added."""
        header: dict[str, object] = {}
        place = 0
        # Wide types come first, as in the files of the format's own writer, so that every tensor is aligned.
        ordered = sorted(self._entries.items(), key=lambda item: (-_width(item[1][0]), item[0]))
        for name, (dtype, shape, _, size) in ordered:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
            place += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self._spool.close()
        try:
            with self._waiting.open("rb") as spool, self._path.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for _, (_, _, start, size) in ordered:
                    spool.seek(start)
                    _copy(spool, file, size)
            self._waiting.unlink()
        except OSError as error:
            raise self._refusal(error) from error

    def drop(self) -> None:
        """Removes the file of waiting bytes, after a failure."""
        self._spool.close()
        self._waiting.unlink(missing_ok=True)

    def _opened(self) -> BinaryIO:
        try:
            return self._waiting.open("wb")
        except OSError as error:
            raise self._refusal(error) from error

    def _write(self, content: memoryview) -> None:
        try:
            self._spool.write(content)
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> DataError:
        return DataError(
            f"package={str(self._path.parent)!r}: cannot be written ({error.strerror}); free disk space, then build "
            "again"
        )


class TensorReader:
    """A safetensors file that is read tensor by tensor, into memory of the tensors' own.

    A mapped file would stay in memory as a whole once every tensor was hashed, and could change after that.

    Args:
      path: path of the file.

    Raises:
      SafetensorError: the file is not in the format.
      MalformedMessage: a tensor has a dtype that no package has.
    """

    def __init__(self, path: Path) -> None:
        self._places: dict[str, tuple[torch.dtype, list[int], int, int]] = {}
        dtypes = {name: dtype for dtype, name in NAMES.items()}
        place = 0
        with safe_open(path, framework="pt") as checked:  # refuses holes, overlaps and wrong lengths
            for name in checked.offset_keys():
                entry = checked.get_slice(name)
                if (dtype := dtypes.get(entry.get_dtype())) is None:
                    raise MalformedMessage(f"tensor={name}: no package has its dtype; fetch the package again")
                shape = list(entry.get_shape())
                size = prod(shape) * dtype.itemsize
                self._places[name] = (dtype, shape, place, size)
                place += size
        self._file = path.open("rb")
        self._start = 8 + int.from_bytes(self._file.read(8), "little")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._places)

    def read(self, name: str) -> Tensor:
        """Returns a tensor of the file, on the CPU.

        Raises:
          MalformedMessage: the file has become shorter.
        """
        dtype, shape, place, size = self._places[name]
        content = torch.empty(size, dtype=torch.uint8)
        self._file.seek(self._start + place)
        if self._file.readinto(memoryview(content.numpy())) != size:
            raise MalformedMessage(f"tensor={name}: the file ends before it; fetch the package again")
        return content.view(dtype).reshape(shape)


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        piece = source.read(min(size, PIECE))
        target.write(piece)
        size -= len(piece)


def _width(name: str) -> int:
    return next(dtype.itemsize for dtype, known in NAMES.items() if known == name)
