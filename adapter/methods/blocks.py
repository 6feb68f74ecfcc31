"""Whole blocks are trained, as in offsite-tuning itself: the change of every weight, bias and norm of a slot."""

from collections import OrderedDict

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from offsite.adapter.inject import train_only
from offsite.adapter.side_modules import add_parallel, is_side_module, replace_forward, shallow_clone, zero_linear
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import choose, in_slots, is_linear, is_norm, leaf_names, lengths
from offsite.errors import UnsupportedModel


class LinearChange(nn.Module):
    """A float32 dense layer with a change of its weight and bias, zero at the start: y = x (W + change)^T + b + change.

    One product instead of the frozen layer's and one beside it. The frozen values are read from the layer at each call.

    Args:
      layer: `nn.Linear`, or GPT-2's Conv1D, frozen; its output is bit-identical until the change moves.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # In a tuple: the layer holds this module, so as its child it would hold itself.
        self._layer = (layer,)
        self._transposed = isinstance(layer, Conv1D)
        has_bias = getattr(layer, "bias", None) is not None
        zero = zero_linear(*lengths(layer), bias=has_bias, device=layer.get_parameter("weight").device)
        self.weight, self.bias = zero.weight, zero.bias  # (outputs, inputs) and (outputs,), also for Conv1D

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the changed layer's whole output, (..., outputs) of (..., inputs)."""
        layer = self._layer[0]
        bias = None if self.bias is None else layer.get_parameter("bias") + self.bias
        if not self._transposed:
            return functional.linear(inputs, layer.get_parameter("weight") + self.weight, bias)
        weight = layer.get_parameter("weight") + self.weight.T
        # As Conv1D itself computes it, to the last bit.
        flat = torch.addmm(bias, inputs.reshape(-1, inputs.shape[-1]), weight)
        return flat.view(*inputs.shape[:-1], weight.shape[1])


class NormChange(nn.Module):
    """A change of a norm's weight and bias, zero at the start.

    Args:
      norm: any of one vector `weight` and perhaps one `bias`, frozen; it stays as it is.
      whole: whether the output is the changed norm's own, or what it gains by the change.
    """

    def __init__(self, norm: nn.Module, *, whole: bool) -> None:
        super().__init__()
        bare = shallow_clone(norm)  # called without the norm's hooks, which have run where this is called
        bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
        self._bare, self._whole = (bare,), whole  # in a tuple: its parameters are the norm's and have no other names
        for name, parameter in norm.named_parameters():
            change = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            self.register_parameter(name, nn.Parameter(change))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the changed norm's output, (..., features), or its difference to the frozen norm's."""
        bare = self._bare[0]
        plain = {name: p if self._whole else p.to(hidden.dtype) for name, p in bare.named_parameters()}
        changed = {name: p + getattr(self, name) for name, p in plain.items()}
        after: torch.Tensor = functional_call(bare, changed, (hidden,))
        return after if self._whole else after - functional_call(bare, plain, (hidden,))


def attach_blocks(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Trains a change, zero at the start, beside every dense layer and norm of the slots, or of the targets in them.

    Xiao et al. 2023, arXiv 2302.04870, section 3.2. The base weights stay as they are and the changes are float32, so
    that a step below the base's precision is not lost, and what is uploaded is a change to begin with. A float32 dense
    layer and its change are one product; in other dtypes, and on layers held as codes, the change has its own.

    Raises:
      UnsupportedModel: the slots hold parameters of other kinds of layers, which would silently not be trained.
    """
    candidates = in_slots(model, spec.slots, lambda module: is_linear(module) or is_norm(module))
    found = choose(candidates, spec, leaf_names(candidates))
    if not spec.targets:
        _refuse_others(model, spec)
    for module in found.values():
        if _merges(module):
            replace_forward(module, LinearChange(module))
        elif is_linear(module):
            bias = getattr(module, "bias", None) is not None
            device = module.get_parameter("weight").device
            add_parallel(module, zero_linear(*lengths(module), bias=bias, device=device))
        elif module.get_parameter("weight").dtype == torch.float32:
            replace_forward(module, NormChange(module, whole=True))
        else:
            add_parallel(module, NormChange(module, whole=False))
    train_only(model, is_side_module)
    return model


def _merges(module: nn.Module) -> bool:
    """Whether weight and change may be added before the product: in 16 bits the sum would round the change away."""
    return type(module) in (nn.Linear, Conv1D) and module.get_parameter("weight").dtype == torch.float32


def _refuse_others(model: nn.Module, spec: AdapterSpec) -> None:
    kept = in_slots(model, spec.slots, lambda module: any(True for _ in module.parameters(recurse=False)))
    for name, module in kept.items():
        if not (is_linear(module) or is_norm(module)):
            raise UnsupportedModel(
                f"layer={name!r} is a {type(module).__name__}, method 'blocks' trains dense layers and norms; name "
                "targets to train only those"
            )
