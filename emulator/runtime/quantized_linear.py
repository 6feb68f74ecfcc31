"""Frozen layers that keep their weights as the package stores them: a site needs less memory, for equal results.

A layer of 4-bit codes takes a seventh of the memory of its float32 weights. Its results are the same to the last bit,
forwards and backwards: each call makes the same numbers of the same codes and drops them again. A weight of more than
`LARGE` numbers, as a head has, is widened a few rows at a time, and its results are the same but for rounding.
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from offsite.emulator.package.bit_packing import Scratch
from offsite.emulator.package.stored_weight import StoredWeight

LARGE = 1 << 24
_SCRATCH = Scratch()


class _DequantizedProduct(torch.autograd.Function):
    """A dense layer's product for which autograd keeps no weight: the backward pass makes the weight anew."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor, layer: "DequantizingLinear") -> Tensor:
        return layer.product(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.layer.transposed_product(gradient), None


class _Stored(nn.Module):
    """What layers with a stored weight have in common.

    The stored weight is neither a parameter nor a buffer: nothing trains it, no step changes it, and it keeps its
    dtypes when the model around it changes its own. It moves to other devices with the model.

    Attributes:
      stored: the weight in its stored form.
      replaced: class of the replaced layer.
    """

    stored: StoredWeight
    replaced: type[nn.Module]

    @property
    def weight(self) -> Tensor:
        """The weight as the replaced layer has it; each access makes it anew, so it cannot be trained."""
        return self.stored.widened(self.stored.dtype)

    def _keep(self, plain: nn.Module, stored: StoredWeight) -> None:
        self.replaced, self.stored = type(plain), stored
        self.train(plain.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A whole number keeps its dtype in every move, so that only the device of `fn` counts.
        self.stored = self.stored.to(fn(torch.empty(0, dtype=torch.uint8, device=self.stored.device)).device)
        super()._apply(fn, recurse)
        return self


class DequantizingLinear(_Stored, nn.Linear):
    """A frozen dense layer that stores its weight as codes or in 16 bits; adapters find it as the layer it replaces.

    Attributes:
      bias: the replaced layer's own bias, (out,), or None; not narrowed, since a refresh may move it.
    """

    def __init__(self, plain: nn.Module, stored: StoredWeight) -> None:
        nn.Module.__init__(self)  # nn.Linear's own __init__ would make the weight that this layer is without
        self._keep(plain, stored)
        self.turned = isinstance(plain, Conv1D)
        self.out_features, self.in_features = stored.shape[::-1] if self.turned else stored.shape
        self.register_parameter("bias", plain._parameters.get("bias"))

    @property
    def weight(self) -> Tensor:
        """The weight, (out, in); each access makes it anew, so it cannot be trained."""
        return self._turned(self.stored.widened(self.stored.dtype))

    def _row_blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yields the weight in order as (place among the outputs, (n, in)); the next block takes a block's memory."""
        if self.turned or self.in_features * self.out_features <= LARGE:
            yield slice(0, self.out_features), self._turned(self.stored.widened(dtype, _SCRATCH))
        else:
            yield from ((place, rows.to(dtype)) for place, rows in self.stored.blocks(_SCRATCH))

    def _turned(self, weight: Tensor) -> Tensor:
        return weight.T if self.turned else weight

    def product(self, inputs: Tensor) -> Tensor:
        """Returns the layer's outputs (..., out) for inputs (..., in), without a gradient."""
        if not inputs.numel():
            return inputs.new_empty((*inputs.shape[:-1], self.out_features))
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        outputs = None
        for place, rows in self._row_blocks(inputs.dtype):
            part = functional.linear(inputs, rows, None if bias is None else bias[place])
            if len(rows) == self.out_features:
                return part
            outputs = inputs.new_empty((*inputs.shape[:-1], self.out_features)) if outputs is None else outputs
            outputs[..., place] = part
        return outputs

    def transposed_product(self, gradient: Tensor) -> Tensor:
        """Returns the gradient of the inputs, (..., in), for one of the outputs, (..., out)."""
        parts = (gradient[..., place] @ rows for place, rows in self._row_blocks(gradient.dtype))
        total = next(parts)
        for part in parts:
            total += part
        return total

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the layer's outputs (..., out) for inputs (..., in)."""
        if torch.is_grad_enabled() and inputs.requires_grad:
            outputs: Tensor = _DequantizedProduct.apply(inputs, self)
            return outputs
        return self.product(inputs)


class DequantizingEmbedding(_Stored, nn.Embedding):
    """A frozen table of words that stores its rows as codes or in 16 bits, and widens those that are asked for."""

    def __init__(self, plain: nn.Embedding, stored: StoredWeight) -> None:
        nn.Module.__init__(self)
        self._keep(plain, stored)
        self.num_embeddings, self.embedding_dim = stored.shape
        self.padding_idx = plain.padding_idx  # of no effect on a table that does not train
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the rows (..., width) of ids, int64 (...), each 0 <= id < the number of rows."""
        rows = self.stored.rows(ids.reshape(-1)).to(self.stored.dtype)
        return rows.reshape(*ids.shape, self.embedding_dim)


def held_layer(plain: nn.Module, stored: StoredWeight) -> nn.Module:
    """Returns the layer with a stored weight that replaces a plain layer of `can_hold`."""
    return (
        DequantizingEmbedding(plain, stored) if isinstance(plain, nn.Embedding) else DequantizingLinear(plain, stored)
    )


def can_hold(plain: nn.Module) -> bool:
    """Returns whether a layer can be replaced by one with a stored weight: dense layers and plain tables of words."""
    return type(plain) in (nn.Linear, Conv1D) or (type(plain) is nn.Embedding and plain.max_norm is None)


def is_held(module: nn.Module) -> TypeGuard["DequantizingLinear | DequantizingEmbedding"]:
    """Returns whether a module is a layer with a stored weight."""
    return type(module) in _KINDS


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Returns a module's class, or the class of the layer that a layer with a stored weight replaces."""
    return module.replaced if is_held(module) else type(module)


def own_weights(module: nn.Module) -> dict[str, nn.Parameter | StoredWeight]:
    """Returns a module's own frozen weights by name, stored or not, in the order of the replaced layer's parameters."""
    first: dict[str, nn.Parameter | StoredWeight] = {"weight": module.stored} if isinstance(module, _Stored) else {}
    return first | {name: value for name, value in module._parameters.items() if value is not None}


def count_weights(module: nn.Module) -> int:
    """Returns the number of a module's parameters, stored weights among them; one that is shared counts once."""
    found = {id(one): one for part in module.modules() for one in own_weights(part).values()}
    return sum(prod(one.shape) for one in found.values())


def bytes_of(module: nn.Module) -> int:
    """Returns the bytes of a module's weights as they lie in memory; one that is shared counts once."""
    found = {id(one): one for part in module.modules() for one in own_weights(part).values()}
    return sum(one.size if isinstance(one, StoredWeight) else one.nbytes for one in found.values())


_KINDS = (DequantizingLinear, DequantizingEmbedding)
