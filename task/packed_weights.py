"""Packed tensors of quantised checkpoints as dense ones in float16, each widened when it is read."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from offsite.errors import DataError
from offsite.task.model_folder import document, weight_files
from offsite.task.packed_format import AWQ, GPTQ, INT8, PackedFormat, packed_format

WIDE = torch.float16
WORD = 32  # bits of an integer that holds several codes
PACKED = (torch.int32, torch.uint32)
# AutoAWQ, WQLinear_GEMM: field j of a word holds the output that stands at this place among the word's eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
STATE = ".quant_state.bitsandbytes__"
Pieces = Mapping[str, Tensor]


@dataclass(frozen=True)
class StoredTensor:
    """A dense tensor of a checkpoint, read from its pieces each time that it is asked for.

    Attributes:
      name: name of the dense tensor.
      pieces: stored name and file of each piece, by the piece's short name.
      widen: function from the pieces to the tensor.
    """

    name: str
    pieces: Mapping[str, tuple[str, Path]]
    widen: Callable[[Pieces], Tensor]

    @property
    def file(self) -> Path:
        """The file of the first piece."""
        return next(iter(self.pieces.values()))[1]

    @property
    def packed(self) -> bool:
        """Whether the tensor is widened from codes."""
        return len(self.pieces) > 1

    def read(self) -> Tensor:
        """Returns the tensor; of a packed layer float16, (outputs, inputs).

        Raises:
          DataError: the pieces do not belong together.
        """
        pieces = dict[str, Tensor]()
        for short, (stored, path) in self.pieces.items():
            with safe_open(path, framework="pt") as file:
                pieces[short] = file.get_tensor(stored)
        try:
            return self.widen(pieces)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            shapes = {short: tuple(piece.shape) for short, piece in pieces.items()}
            raise DataError(
                f"tensor={self.name}: its packed pieces {shapes} do not belong together ({error}); fetch the "
                "checkpoint again"
            ) from error

    def __getitem__(self, place: Any) -> Tensor:
        """Returns a part of the tensor; transformers reads a tensor of a state dict as `tensor[...]`."""
        return self.read()[place]


def dense_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Returns the dense tensors of a quantised checkpoint by name; {} for a plain checkpoint.

    Raises:
      UnsupportedModel: the packed format is not read here.
      DataError: files are missing, or a packed layer lacks a piece.
    """
    packed = packed_format(folder, document(folder))
    if packed is None:
        return {}
    files = weight_files(folder)
    found = _integers(files, packed) if packed.name in (GPTQ, AWQ) else _bitsandbytes(files, packed)
    if not found:
        raise DataError(
            f"model={str(folder)!r}: config.json names {packed.name}, and no tensor of the weights is packed so; copy "
            "the config.json that belongs to these weights"
        )
    used = {stored for tensor in found.values() for stored, _ in tensor.pieces.values()}
    for name, path in files.items():
        if name not in used:
            found[name] = StoredTensor(name, {"": (name, path)}, lambda pieces: pieces[""])
    return found


def without_zero_biases(tensors: Mapping[str, StoredTensor], names: Iterable[str]) -> list[str]:
    """Returns names without the zero biases of packed layers, which some packers store for layers that have none.

    Args:
      tensors: dense tensors of the checkpoint.
      names: stored names for which the model has no place.

    Raises:
      DataError: such a bias is not zero, so that the model without it would be another.
    """
    left = []
    for name in names:
        layer = tensors.get(f"{name.removesuffix('.bias')}.weight")
        if not (name.endswith(".bias") and name in tensors and layer is not None and layer.packed):
            left.append(name)
        elif bool(tensors[name].read().count_nonzero()):
            raise DataError(
                f"tensor={name}: a bias that is not zero, for which the model of config.json has no place; copy the "
                "config.json that belongs to these weights"
            )
    return left


def _integers(files: Mapping[str, Path], packed: PackedFormat) -> dict[str, StoredTensor]:
    """Returns the layers of GPTQ or AWQ: codes, zero points and scales of groups of inputs."""
    found, short = dict[str, StoredTensor](), ("qweight", "qzeros", "scales")
    for path in sorted(name.removesuffix(".qweight") for name in files if name.endswith(".qweight")):
        index = ("g_idx",) if packed.name == GPTQ and f"{path}.g_idx" in files else ()
        pieces = _pieces(files, path, (*short, *index), ".")
        widen = _awq if packed.name == AWQ else _gptq(packed)
        found[f"{path}.weight"] = StoredTensor(f"{path}.weight", pieces, widen)
    return found


def _bitsandbytes(files: Mapping[str, Path], packed: PackedFormat) -> dict[str, StoredTensor]:
    """Returns the layers of bitsandbytes: codes of single weights, and the largest weight of each block or row."""
    found = dict[str, StoredTensor]()
    if packed.name == INT8:
        for path in sorted(name.removesuffix(".SCB") for name in files if name.endswith(".SCB")):
            form = (".weight_format",) if f"{path}.weight_format" in files else ()
            found[f"{path}.weight"] = StoredTensor(
                f"{path}.weight", _pieces(files, path, (".weight", ".SCB", *form)), _rows
            )
        return found
    for state in sorted(name for name in files if STATE in name):
        name, _, kind = state.partition(STATE)
        double = (".nested_absmax", ".nested_quant_map") if f"{name}.nested_absmax" in files else ()
        pieces = _pieces(files, name, ("", ".absmax", ".quant_map", f"{STATE}{kind}", *double))
        pieces[".state"] = pieces.pop(f"{STATE}{kind}")
        found[name] = StoredTensor(name, pieces, _blocks)
    return found


def _pieces(
    files: Mapping[str, Path], path: str, short: Iterable[str], between: str = ""
) -> dict[str, tuple[str, Path]]:
    stored = {name: f"{path}{between}{name}" for name in short}
    if missing := sorted(name for name in stored.values() if name not in files):
        raise DataError(f"tensor={missing[0]} is missing beside the packed layer {path!r}; fetch the checkpoint again")
    return {name: (full, files[full]) for name, full in stored.items()}


def _gptq(packed: PackedFormat) -> Callable[[Pieces], Tensor]:
    """Returns the function that widens a layer of GPTQ.

    AutoGPTQ, qlinear: word i of a column of `qweight`, int32 (inputs * bits / 32, outputs), holds the codes of inputs
    i * 32 / bits and following, the first in the lowest bits. `qzeros`, (groups, outputs * bits / 32), holds zero
    points in the same way along the outputs, in the first layout less 1. `g_idx`, (inputs,), names each input's group.
    """

    def widen(pieces: Pieces) -> Tensor:
        scales, mask = pieces["scales"], 2**packed.bits - 1
        groups, outputs = scales.shape
        codes = _fields(pieces["qweight"], packed.bits).movedim(2, 1).reshape(-1, outputs)
        zeros = _fields(pieces["qzeros"], packed.bits).reshape(groups, outputs).add_(packed.shift).bitwise_and_(mask)
        inputs = len(codes)
        group = pieces.get("g_idx", torch.arange(inputs) // -(-inputs // groups)).long()
        if tuple(group.shape) != (inputs,) or int(group.min()) < 0:
            raise ValueError("g_idx does not name a group of each input")
        return _widened(codes, zeros[group], scales[group])

    return widen


def _awq(pieces: Pieces) -> Tensor:
    """Returns a layer of AWQ: `qweight`, int32 (inputs, outputs / 8), and `qzeros`, (groups, outputs / 8)."""
    scales, order = pieces["scales"], torch.tensor(AWQ_ORDER).argsort()
    groups, outputs = scales.shape
    codes, zeros = (
        _fields(pieces[name], 4)[..., order].reshape(rows, outputs)
        for name, rows in (("qweight", len(pieces["qweight"])), ("qzeros", groups))
    )
    if len(codes) % groups:
        raise ValueError("the groups do not divide the inputs")
    each = len(codes) // groups
    return _widened(codes, zeros.repeat_interleave(each, 0), scales.repeat_interleave(each, 0))


def _fields(words: Tensor, bits: int) -> Tensor:
    """Returns the codes in words (rows, columns) as int32 (rows, columns, codes of a word), lowest bits first."""
    if words.dtype not in PACKED:
        raise ValueError(f"codes of {words.dtype}, not int32")
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    return (words.view(torch.int32).unsqueeze(-1) >> shifts).bitwise_and_(2**bits - 1)


def _widened(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """Returns the weight (outputs, inputs) of codes, zero points and scales (inputs, outputs).

    A code less its zero point is a whole number of few bits, so that the float32 product is exact and is rounded once.
    """
    return (codes.sub_(zeros).float().mul_(scales.float())).to(WIDE).t().contiguous()


def _rows(pieces: Pieces) -> Tensor:
    """Returns a layer of LLM.int8() (Dettmers et al. 2022, section 2.1): int8 codes, and the largest of each row."""
    if ".weight_format" in pieces and int(pieces[".weight_format"].sum()):
        raise ValueError("weight_format is not row by row")
    codes, largest = pieces[".weight"], pieces[".SCB"].float()
    if codes.dtype != torch.int8 or codes.shape[:1] != largest.shape:
        raise ValueError(f"codes of {codes.dtype}, not int8")
    return (codes.float() * (largest / 127).unsqueeze(1)).to(WIDE)


def _blocks(pieces: Pieces) -> Tensor:
    """Returns a layer of QLoRA's 4 bits (Dettmers et al. 2023, section 3): a table's entry times a block's largest."""
    state = json.loads(bytes(pieces[".state"].tolist()))
    stored, shape = pieces[""].contiguous().view(torch.uint8).reshape(-1), tuple(map(int, state["shape"]))
    codes = torch.stack([stored >> 4, stored & 15], dim=1).reshape(-1)  # the first of two weights in the high bits
    largest = pieces[".absmax"].reshape(-1)
    if ".nested_absmax" in pieces:
        outer = pieces[".nested_absmax"].float().repeat_interleave(int(state["nested_blocksize"]))[: len(largest)]
        largest = pieces[".nested_quant_map"].float()[largest.long()] * outer + float(state["nested_offset"])
    each = largest.float().repeat_interleave(int(state["blocksize"]))
    count = torch.Size(shape).numel()
    return (pieces[".quant_map"].float()[codes[:count].long()] * each[:count]).reshape(shape).to(WIDE)
