"""Frozen dense layers that keep their weights as the package stores them: a site needs less memory, for equal results.

A layer of 4-bit codes takes a seventh of the memory of its float32 weights. Its results are the same to the last bit,
forwards and backwards: each call makes the same numbers of the same codes and drops them again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from offsite.emulator.package import storage
from offsite.emulator.package.manifest import WEIGHTS, Manifest
from offsite.emulator.package.quantization_scheme import Scheme
from offsite.emulator.package.quantize import Quantised, dequantize
from offsite.emulator.structure.towers import blocks_at


class _DequantizedProduct(torch.autograd.Function):
    """A dense layer's product for which autograd keeps no weight: the backward pass makes the weight anew."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: "DequantizingLinear") -> Tensor:
        ctx.layer = layer
        return functional.linear(inputs, layer.widened(inputs), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.layer.widened(gradient), None


@dataclass(frozen=True)
class StoredWeight:
    """A frozen weight in its stored form.

    Attributes:
      pieces: stored tensors, of any dtypes.
      widen: function that makes the weight of the pieces, (out, in), float32.
    """

    pieces: tuple[Tensor, ...]
    widen: Callable[[Sequence[Tensor]], Tensor]

    @property
    def size(self) -> int:
        """Bytes of all pieces."""
        return sum(_size(piece) for piece in self.pieces)


class DequantizingLinear(nn.Linear):
    """A frozen dense layer that stores its weight as codes or in 16 bits; adapters find it as the layer it replaces.

    Attributes:
      bias: the replaced layer's own bias, (out,), or None; not narrowed, since a refresh may move it.
    """

    def __init__(self, plain: nn.Module, stored: StoredWeight) -> None:
        nn.Module.__init__(self)  # nn.Linear's own __init__ would make the weight that this layer is without
        weight = plain.get_parameter("weight")
        self.out_features, self.in_features = weight.shape[::-1] if isinstance(plain, Conv1D) else weight.shape
        self._pieces, self._widen = len(stored.pieces), stored.widen
        for number, piece in enumerate(stored.pieces):
            self.register_buffer(f"piece_{number}", piece.to(weight.device), persistent=False)
        self.register_parameter("bias", plain._parameters.get("bias"))

    @property
    def weight(self) -> Tensor:
        """The weight, (out, in), float32; each access makes it anew, so it cannot be trained."""
        return self._widen([self.get_buffer(f"piece_{number}") for number in range(self._pieces)])

    def widened(self, like: Tensor) -> Tensor:
        """Returns the weight, (out, in), in another tensor's dtype."""
        return self.weight.to(like.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the layer's outputs (..., out) for inputs (..., in)."""
        if torch.is_grad_enabled() and inputs.requires_grad:
            outputs: Tensor = _DequantizedProduct.apply(inputs, self)
            return outputs
        return functional.linear(inputs, self.widened(inputs), self.bias)


def replace_linears(
    model: nn.Module, folder: Path, manifest: Manifest, rounded: Mapping[str, StoredWeight] | None = None
) -> int:
    """Replaces a loaded emulator's frozen dense layers by layers that keep the package's stored form, in place.

    Blocks that are shipped verbatim stay as they are, since some adapters are built of their weights. So do tables of
    words, layers that share their weight, and weights that the package stores as wide as they run.

    Args:
      model: the emulator as `package_reader.load` returned it, before any adapter.
      folder: the package's folder.
      manifest: the package's manifest.
      rounded: weights in another form than the package's, by layer path, from `bitsandbytes_layers.round_layers`.

    Returns:
      The number of bytes that the model got smaller.
    """
    saved = 0
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for path, module, how in list(dense(model, manifest)):
            name, weight = f"{path}.weight", module.get_parameter("weight")
            stored = rounded.get(path) if rounded else None
            if stored is None:
                scheme, narrow = _scheme(how, weight)
                if not narrow:
                    continue
                pieces = tuple(file.get_tensor(piece) for piece in storage.names(name, how))
                transposed = isinstance(module, Conv1D)
                stored = StoredWeight(
                    pieces, partial(_widen, scheme=scheme, shape=tuple(weight.shape), transposed=transposed)
                )
            saved += _size(weight) - stored.size
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, DequantizingLinear(module, stored).eval())
    return saved


def dense(model: nn.Module, manifest: Manifest) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields (path, layer, storage) of each dense layer of a loaded emulator that is neither shared nor in an end."""
    geometry = manifest.geometry
    names = [f"{path}." for path in blocks_at(model, geometry.tower)]
    ends = (*names[: geometry.first], *names[len(names) - geometry.last :])
    shared = set(manifest.tied) | set(manifest.tied.values())
    for path, module in model.named_modules():
        name = f"{path}.weight"
        how = manifest.storage.get(name, "")
        if type(module) in (nn.Linear, Conv1D) and not name.startswith(ends) and name not in shared and how:
            yield path, module, how


def _widen(pieces: Sequence[Tensor], *, scheme: Scheme | None, shape: tuple[int, ...], transposed: bool) -> Tensor:
    """Returns the weight, (out, in), float32, that the package stores in these pieces."""
    weight = pieces[0].float() if scheme is None else dequantize(Quantised(*pieces), shape, scheme)
    return weight.T if transposed else weight


def _scheme(how: str, weight: Tensor) -> tuple[Scheme | None, bool]:
    """Returns a storage's scheme, if it has one, and whether the storage is narrower than the weight in the model."""
    scheme = storage.parse(how)
    if scheme is not None:
        return scheme, True
    return None, storage.is_verbatim(how) and storage.DTYPES[how].itemsize < weight.dtype.itemsize


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
