"""Frozen dense layers held as the package stores them, and widened where they run: a site's memory, not its results.

A layer of 4-bit codes takes a seventh of its float32 weights. What it computes is the same to the last bit, forwards
and backwards, since the same numbers are made of the same codes at every call and forgotten again.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from emulator import storage
from emulator.manifest import WEIGHTS, Manifest
from emulator.quantize import Quantised, dequantize
from emulator.scheme import Scheme


class _Widened(torch.autograd.Function):
    """A dense layer of which autograd keeps no weight: it is made anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: "HeldLinear") -> Tensor:
        ctx.layer = layer
        return functional.linear(inputs, layer.widened(inputs), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.layer.widened(gradient), None


class HeldLinear(nn.Linear):
    """A frozen dense layer whose weight lies here as codes or in 16 bits; adapters find it as the layer it stands for.

    Attributes:
      bias: (out,) or None, as wide as the model is, since a refresh may move it.
    """

    def __init__(self, plain: nn.Module, held: Quantised | Tensor, scheme: Scheme | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make the weight that this layer is without
        weight = plain.get_parameter("weight")
        self._shape, self._scheme, self._transposed = tuple(weight.shape), scheme, isinstance(plain, Conv1D)
        self.out_features, self.in_features = self._shape[::-1] if self._transposed else self._shape
        pieces = (held,) if isinstance(held, Tensor) else held.pieces
        for number, piece in enumerate(pieces):
            self.register_buffer(f"piece_{number}", piece.to(weight.device), persistent=False)
        self._pieces = len(pieces)
        self.register_parameter("bias", plain._parameters.get("bias"))

    @property
    def weight(self) -> Tensor:
        """The weight, (out, in), float32; made anew at each call, so it cannot be trained."""
        return self._plain()

    def widened(self, like: Tensor) -> Tensor:
        """Returns the weight, (out, in), in another tensor's dtype."""
        return self._plain().to(like.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns (..., out) of (..., in)."""
        if torch.is_grad_enabled() and inputs.requires_grad:
            found: Tensor = _Widened.apply(inputs, self)
            return found
        return functional.linear(inputs, self.widened(inputs), self.bias)

    def _plain(self) -> Tensor:
        pieces = [self.get_buffer(f"piece_{number}") for number in range(self._pieces)]
        scheme = self._scheme
        weight = pieces[0].float() if scheme is None else dequantize(Quantised(*pieces), self._shape, scheme)
        return weight.T if self._transposed else weight


def hold(model: nn.Module, folder: Path, manifest: Manifest) -> int:
    """Puts layers that are held as stored in the places of a loaded emulator's frozen dense layers, in place.

    Blocks that are shipped verbatim stay as they are, since some adapters are built of their weights. So do tables of
    words, layers that share their weight, and weights that the package stores as wide as they run.

    Args:
      model: as `package.load` returned it, before any adapter.
      folder: the package.
      manifest: of the package.

    Returns:
      How many bytes fewer the model holds.
    """
    geometry = manifest.geometry
    names = [f"{geometry.tower}.{name}." for name, _ in model.get_submodule(geometry.tower).named_children()]
    ends = (*names[: geometry.first], *names[len(names) - geometry.last :])
    shared = set(manifest.tied) | set(manifest.tied.values())
    saved = 0
    with safe_open(folder / WEIGHTS, framework="pt") as stored:
        for path, module in list(model.named_modules()):
            name = f"{path}.weight"
            how = manifest.storage.get(name, "")
            if type(module) not in (nn.Linear, Conv1D) or name.startswith(ends) or name in shared or not how:
                continue
            weight = module.get_parameter("weight")
            pieces = [stored.get_tensor(piece) for piece in storage.names(name, how)]
            scheme, narrow = _held(how, weight)
            if not narrow:
                continue
            held = pieces[0] if scheme is None else Quantised(*pieces)
            saved += _size(weight) - sum(_size(piece) for piece in pieces)
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, HeldLinear(module, held, scheme).eval())
    return saved


def _held(how: str, weight: Tensor) -> tuple[Scheme | None, bool]:
    """Returns the scheme of codes, and whether a storage is narrower than the weight is in the model."""
    scheme = storage.parse(how)
    if scheme is not None:
        return scheme, True
    return None, storage.is_verbatim(how) and storage.DTYPES[how].itemsize < weight.dtype.itemsize


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
