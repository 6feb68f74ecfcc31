"""A safetensors file written tensor by tensor, so that the emulator is never in memory as a whole.

The format is a length, a header in JSON and the tensors' bytes. The header comes first but is known last, so the bytes
wait in a second file until the header is known.
"""

import json
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from offsite.emulator.package.package_folder import tensor_sha256
from offsite.errors import DataError

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


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        piece = source.read(min(size, PIECE))
        target.write(piece)
        size -= len(piece)


def _width(name: str) -> int:
    return next(dtype.itemsize for dtype, known in NAMES.items() if known == name)
