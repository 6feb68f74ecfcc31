"""Frozen dense layers held as the package stores them, and widened where they run: a site's memory, not its results.

A layer of 4-bit codes takes a seventh of its float32 weights. What it computes is the same to the last bit, forwards
and backwards, since the same numbers are made of the same codes at every call and forgotten again.
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


class _Widened(torch.autograd.Function):
    """A dense layer of which autograd keeps no weight: it is made anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: "DequantizingLinear") -> Tensor:
        ctx.layer = layer
        return functional.linear(inputs, layer.widened(inputs), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.layer.widened(gradient), None


@dataclass(frozen=True)
class StoredWeight:
    """A frozen weight in the form in which it lies in memory.

    Attributes:
      pieces: tensors of any dtypes.
      widen: makes the weight of them, (out, in), float32.
    """

    pieces: tuple[Tensor, ...]
    widen: Callable[[Sequence[Tensor]], Tensor]

    @property
    def size(self) -> int:
        """Bytes of all pieces."""
        return sum(_size(piece) for piece in self.pieces)


class DequantizingLinear(nn.Linear):
    """A frozen dense layer whose weight lies here as codes or in 16 bits; adapters find it as the layer it stands for.

    Attributes:
      bias: (out,) or None, as wide as the model is, since a refresh may move it.
    """

    def __init__(self, plain: nn.Module, held: StoredWeight) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make the weight that this layer is without
        weight = plain.get_parameter("weight")
        self.out_features, self.in_features = weight.shape[::-1] if isinstance(plain, Conv1D) else weight.shape
        self._pieces, self._widen = len(held.pieces), held.widen
        for number, piece in enumerate(held.pieces):
            self.register_buffer(f"piece_{number}", piece.to(weight.device), persistent=False)
        self.register_parameter("bias", plain._parameters.get("bias"))

    @property
    def weight(self) -> Tensor:
        """The weight, (out, in), float32; made anew at each call, so it cannot be trained."""
        return self._widen([self.get_buffer(f"piece_{number}") for number in range(self._pieces)])

    def widened(self, like: Tensor) -> Tensor:
        """Returns the weight, (out, in), in another tensor's dtype."""
        return self.weight.to(like.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns (..., out) of (..., in)."""
        if torch.is_grad_enabled() and inputs.requires_grad:
            found: Tensor = _Widened.apply(inputs, self)
            return found
        return functional.linear(inputs, self.widened(inputs), self.bias)


def replace_linears(
    model: nn.Module, folder: Path, manifest: Manifest, rounded: Mapping[str, StoredWeight] | None = None
) -> int:
    """Puts layers that are held as stored in the places of a loaded emulator's frozen dense layers, in place.

    Blocks that are shipped verbatim stay as they are, since some adapters are built of their weights. So do tables of
    words, layers that share their weight, and weights that the package stores as wide as they run.

    Args:
      model: as `package.load` returned it, before any adapter.
      folder: the package.
      manifest: of the package.
      rounded: layers that are held in another form than the package's, by path; `rounded.round_layers` gives them.

    Returns:
      How many bytes fewer the model holds.
    """
    saved = 0
    with safe_open(folder / WEIGHTS, framework="pt") as stored:
        for path, module, how in list(dense(model, manifest)):
            name, weight = f"{path}.weight", module.get_parameter("weight")
            held = rounded.get(path) if rounded else None
            if held is None:
                scheme, narrow = _scheme(how, weight)
                if not narrow:
                    continue
                pieces = tuple(stored.get_tensor(piece) for piece in storage.names(name, how))
                transposed = isinstance(module, Conv1D)
                held = StoredWeight(
                    pieces, partial(_stored, scheme=scheme, shape=tuple(weight.shape), transposed=transposed)
                )
            saved += _size(weight) - held.size
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, DequantizingLinear(module, held).eval())
    return saved


def dense(model: nn.Module, manifest: Manifest) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields path, layer and storage of each dense layer of a loaded emulator that is neither shared nor in an end."""
    geometry = manifest.geometry
    names = [f"{path}." for path in blocks_at(model, geometry.tower)]
    ends = (*names[: geometry.first], *names[len(names) - geometry.last :])
    shared = set(manifest.tied) | set(manifest.tied.values())
    for path, module in model.named_modules():
        name = f"{path}.weight"
        how = manifest.storage.get(name, "")
        if type(module) in (nn.Linear, Conv1D) and not name.startswith(ends) and name not in shared and how:
            yield path, module, how


def _stored(pieces: Sequence[Tensor], *, scheme: Scheme | None, shape: tuple[int, ...], transposed: bool) -> Tensor:
    """Returns the weight, (out, in), of what the package stores of it."""
    weight = pieces[0].float() if scheme is None else dequantize(Quantised(*pieces), shape, scheme)
    return weight.T if transposed else weight


def _scheme(how: str, weight: Tensor) -> tuple[Scheme | None, bool]:
    """Returns the scheme of codes, and whether a storage is narrower than the weight is in the model."""
    scheme = storage.parse(how)
    if scheme is not None:
        return scheme, True
    return None, storage.is_verbatim(how) and storage.DTYPES[how].itemsize < weight.dtype.itemsize


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
