"""Packers of quantised checkpoints, written from the definitions of the formats, one number at a time."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Coded:
    """A layer as codes: weight[o, i] = scales[g, o] * (codes[i, o] - zeros[g, o]) with g = group[i]."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    group: np.ndarray

    @property
    def dense(self) -> np.ndarray:
        """The weight, float16 (outputs, inputs)."""
        weight = np.zeros(self.codes.shape[::-1], np.float16)
        for i, row in enumerate(self.codes):
            for o, code in enumerate(row):
                g = self.group[i]
                weight[o, i] = float(self.scales[g, o]) * (int(code) - int(self.zeros[g, o]))
        return weight


def coded(weight: Tensor, bits: int, group: np.ndarray) -> Coded:
    """Returns a weight (outputs, inputs) rounded to the nearest code of a grid from each group's lowest to highest."""
    table = weight.float().numpy().T
    groups, outputs = int(group.max()) + 1, table.shape[1]
    zeros, scales = np.zeros((groups, outputs), np.int64), np.zeros((groups, outputs), np.float16)
    for g in range(groups):
        rows = table[group == g]
        low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        scales[g] = np.maximum((high - low) / (2**bits - 1), 1e-3)
        zeros[g] = np.round(-low / scales[g].astype(np.float64))
    codes = np.round(table / scales[group].astype(np.float64)) + zeros[group]
    return Coded(codes.clip(0, 2**bits - 1).astype(np.int64), zeros.clip(0, 2**bits - 1), scales, group)


def in_words(numbers: np.ndarray, bits: int, order: tuple[int, ...]) -> Tensor:
    """Returns the rows of numbers in words of 32 bits; field j of a word holds number `order[j]` of its 32 / bits."""
    each = 32 // bits
    words = np.zeros((numbers.shape[0], numbers.shape[1] // each), np.uint32)
    for row in range(words.shape[0]):
        for column in range(words.shape[1]):
            word = 0
            for j in range(each):
                word |= int(numbers[row, column * each + order[j]]) << (bits * j)
            words[row, column] = word
    return torch.from_numpy(words.view(np.int32).copy())


def gptq(layer: Coded, bits: int, *, less: int, with_index: bool) -> dict[str, Tensor]:
    """Returns the tensors of a layer of GPTQ; `less` is taken off each zero point."""
    order = tuple(range(32 // bits))
    return {
        "qweight": in_words(layer.codes.T, bits, order).T.contiguous(),
        "qzeros": in_words((layer.zeros - less) % 2**bits, bits, order),
        "scales": torch.from_numpy(layer.scales),
        **({"g_idx": torch.from_numpy(layer.group.astype(np.int32))} if with_index else {}),
    }


def awq(layer: Coded) -> dict[str, Tensor]:
    """Returns the tensors of a layer of AWQ for its GEMM kernel."""
    return {
        "qweight": in_words(layer.codes, 4, AWQ_ORDER),
        "qzeros": in_words(layer.zeros, 4, AWQ_ORDER),
        "scales": torch.from_numpy(layer.scales),
    }


def in_order(inputs: int) -> np.ndarray:
    """Returns the group of each input where groups are neighbours."""
    return np.arange(inputs) // GROUP


def shuffled(inputs: int) -> np.ndarray:
    """Returns the group of each input where groups follow the order of activations."""
    return np.random.default_rng(inputs).permutation(in_order(inputs))


def linear_names(tensors: dict[str, Tensor]) -> Iterator[str]:
    """Yields the paths of the dense layers of a Llama's blocks."""
    for name in tensors:
        if name.endswith("proj.weight"):
            yield name.removesuffix(".weight")


def write(
    model: Path,
    folder: Path,
    settings: dict[str, Any],
    layer_of: Callable[[Tensor], tuple[np.ndarray, dict[str, Tensor]]],
) -> tuple[Path, Path]:
    """Writes a checkpoint with packed layers, and one with the very same weights in float16; returns both folders.

    Args:
      model: folder of a plain Llama.
      folder: folder for the two.
      settings: table `quantization_config`.
      layer_of: function from a weight to its dense float16 form and its packed tensors.
    """
    tensors = {name: tensor.half() for name, tensor in load_file(model / "model.safetensors").items()}
    dense, packed = dict(tensors), dict(tensors)
    for path in list(linear_names(tensors)):
        weight, pieces = layer_of(packed.pop(f"{path}.weight"))
        dense[f"{path}.weight"] = torch.from_numpy(weight)
        packed |= {f"{path}.{name}" if name else f"{path}.weight": piece for name, piece in pieces.items()}
    config = json.loads((model / "config.json").read_text()) | {"dtype": "float16"}
    for name, content, extra in (("dense", dense, {}), ("packed", packed, {"quantization_config": settings})):
        (folder / name).mkdir(parents=True)
        for file in model.iterdir():
            if file.suffix != ".safetensors":
                (folder / name / file.name).write_bytes(file.read_bytes())
        (folder / name / "config.json").write_text(json.dumps(config | extra))
        save_file({key: tensor.contiguous() for key, tensor in content.items()}, folder / name / "model.safetensors")
    return folder / "dense", folder / "packed"
