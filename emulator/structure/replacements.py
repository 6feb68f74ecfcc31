"""Modules that replace a larger module of the full model; a short text in the manifest, the spec, describes each.

`linear:IN:OUT:BIAS` and `conv1d:IN:OUT:1` are narrower dense layers, `lowrank:IN:OUT:RANK:BIAS` is two thin layers, and
`patch:WIDTH` is the linear map in the place of left-out blocks. BIAS is 0 or 1.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from offsite.errors import MalformedMessage

KINDS = {"linear": 3, "conv1d": 3, "lowrank": 4, "patch": 1}
MAX_LENGTH = 1 << 20  # largest length in a spec: no model is that wide
PATCH = "patch"


class LowRank(nn.Linear):
    """A dense layer of low rank, x -> x down^T up^T + bias; adapters find it as the dense layer that it replaces.

    Attributes:
      down: matrix (rank, in).
      up: matrix (out, rank).
      bias: vector (out,), or None.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool) -> None:
        nn.Module.__init__(self)  # nn.Linear's own __init__ would make the weight that this layer is without
        self.in_features, self.out_features = inputs, outputs
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.empty(outputs, rank))
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs)) if bias else None)

    @property
    def weight(self) -> Tensor:
        """The product of both thin matrices, (out, in); computed at each access."""
        return self.up @ self.down

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the layer's outputs (..., out) for inputs (..., in)."""
        return functional.linear(functional.linear(hidden, self.down), self.up, self.bias)


class Patch(nn.Linear):
    """The best linear map from the inputs of a run of blocks to its outputs: x -> x + x W^T + b.

    The identity is not part of the weights, so that W is small if the blocks change little, and survives few bits.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the mapped hidden states, (..., width) as the input."""
        return hidden + super().forward(hidden)


def spec_of(module: nn.Module) -> str:
    """Returns the spec of a module of this file, or of a dense layer of any size."""
    bias = int(getattr(module, "bias", None) is not None)
    if isinstance(module, Patch):
        return f"patch:{module.in_features}"
    if isinstance(module, LowRank):
        return f"lowrank:{module.down.shape[1]}:{module.up.shape[0]}:{module.down.shape[0]}:{bias}"
    if isinstance(module, Conv1D):
        return f"conv1d:{module.weight.shape[0]}:{module.weight.shape[1]}:1"
    if isinstance(module, nn.Linear):
        return f"linear:{module.in_features}:{module.out_features}:{bias}"
    raise TypeError(f"{type(module).__name__} has no spec")


def build_module(spec: str) -> nn.Module:
    """Returns the empty module of a spec, frozen, in evaluation mode, in the default dtype.

    Raises:
      MalformedMessage: the spec is of no known kind, or a length is out of range.
    """
    kind, sizes = _parse(spec)
    part: nn.Module
    with torch.device("cpu"):
        if kind == "patch":
            part = nn.utils.skip_init(Patch, sizes[0], sizes[0])
        elif kind == "lowrank":
            part = LowRank(sizes[0], sizes[1], sizes[2], bias=bool(sizes[3]))
        elif kind == "conv1d":
            part = Conv1D(sizes[1], sizes[0])
        else:
            part = nn.utils.skip_init(nn.Linear, sizes[0], sizes[1], bias=bool(sizes[2]))
    return part.requires_grad_(False).eval()


def check_fits(path: str, spec: str, original: nn.Module | None, width: int) -> None:
    """Refuses a part that no honest compressor would put in the place of the original.

    Args:
      path: module path of the part, for the message.
      spec: spec of the part.
      original: the module that the configuration gives at that path; None for a patch in a left-out block.
      width: width of the hidden states, which a patch must have.

    Raises:
      MalformedMessage: the part's kind or a length does not fit.
    """
    kind, sizes = _parse(spec)
    if kind == PATCH:
        fits = original is None and sizes == (width,)
    elif not isinstance(original, nn.Linear | Conv1D):
        fits = False
    else:
        turned = isinstance(original, Conv1D)
        outputs, inputs = reversed(original.weight.shape) if turned else tuple(original.weight.shape)
        same_kind = kind == "lowrank" or (kind == "conv1d") == turned
        narrower = sizes[0] <= inputs and sizes[1] <= outputs
        thin = kind != "lowrank" or ((sizes[0], sizes[1]) == (inputs, outputs) and sizes[2] <= min(inputs, outputs))
        fits = same_kind and narrower and thin
    if not fits:
        raise MalformedMessage(
            f"part={path}: {spec!r} does not fit the module that the configuration gives; refuse this package"
        )


def weight_of(layer: Any) -> Tensor:
    """Returns the (out, in) matrix of a dense layer or a part."""
    weight: Tensor = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight


def output_rows(layer: Any) -> Tensor:
    """Returns the parameter whose rows are a layer's outputs, as a view that can be written."""
    return layer.up.data if isinstance(layer, LowRank) else weight_of(layer).data


def input_columns(layer: Any) -> Tensor:
    """Returns the parameter whose columns are a layer's inputs, as a view that can be written."""
    return layer.down.data if isinstance(layer, LowRank) else weight_of(layer).data


def frozen(values: Tensor) -> nn.Parameter:
    """Returns a parameter that does not train, on the device of its values."""
    return nn.Parameter(values, requires_grad=False)


def dense_like(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Returns a dense layer with other values, of the same kind as `layer`: GPT-2's transposed kind or the usual one.

    Args:
      layer: a layer of the wanted kind.
      weight: the new layer's weight (out, in), of any sizes.
      bias: the new layer's bias (out,), or None; GPT-2's kind then has a bias of zeros.
    """
    outputs, inputs = weight.shape
    new: nn.Module
    if isinstance(layer, Conv1D):
        new = Conv1D(outputs, inputs)
        new.weight = frozen(weight.T.clone())
        new.bias = frozen(weight.new_zeros(outputs) if bias is None else bias.clone())
    else:
        new = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias is not None)
        new.weight = frozen(weight.clone())
        if bias is not None:
            new.bias = frozen(bias.clone())
    return new.requires_grad_(False).eval()


def _parse(spec: str) -> tuple[str, tuple[int, ...]]:
    kind, *sizes = spec.split(":")
    numbers = tuple(int(size) for size in sizes if size.isascii() and size.isdecimal() and len(size) < 9)
    count = KINDS.get(kind)
    lengths = numbers if kind == PATCH else numbers[:-1]
    flag = kind == PATCH or (bool(numbers) and numbers[-1] in (0, 1))
    if count is None or len(sizes) != count or len(numbers) != count or not flag:
        raise MalformedMessage(f"part={spec!r} is not known; known: {', '.join(KINDS)} with their sizes; build again")
    if not all(0 < length <= MAX_LENGTH for length in lengths):
        raise MalformedMessage(f"part={spec!r}: every length must be in 1..{MAX_LENGTH}; refuse this package")
    return kind, numbers
