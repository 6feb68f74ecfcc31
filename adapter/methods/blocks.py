"""Trains whole blocks, as offsite-tuning itself does: a change of every weight, bias and norm of a slot."""

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

    This takes one matrix product; the frozen layer and a parallel change would take two. The frozen values are read
    from the layer at each call.

    Args:
      layer: frozen `nn.Linear` or GPT-2's Conv1D; its output stays bit-identical until the change moves.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # In a tuple: the layer holds this module, so a child module `layer` would make a cycle.
        self._layer = (layer,)
        self._transposed = isinstance(layer, Conv1D)
        has_bias = getattr(layer, "bias", None) is not None
        zero = zero_linear(*lengths(layer), bias=has_bias, device=layer.get_parameter("weight").device)
        self.weight, self.bias = zero.weight, zero.bias  # (outputs, inputs) and (outputs,), also for Conv1D

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the changed layer's whole output, (..., outputs), for inputs (..., inputs)."""
        layer = self._layer[0]
        bias = None if self.bias is None else layer.get_parameter("bias") + self.bias
        if not self._transposed:
            return functional.linear(inputs, layer.get_parameter("weight") + self.weight, bias)
        weight = layer.get_parameter("weight") + self.weight.T
        # The same operations as in Conv1D's own forward, so that the output is equal to the last bit.
        flat = torch.addmm(bias, inputs.reshape(-1, inputs.shape[-1]), weight)
        return flat.view(*inputs.shape[:-1], weight.shape[1])


class NormChange(nn.Module):
    """A change of a norm's weight and bias, zero at the start.

    Args:
      norm: frozen norm with a vector `weight` and at most a vector `bias`; its parameters stay as they are.
      whole: whether the output is the changed norm's whole output, or its difference from the frozen norm's output.
    """

    def __init__(self, norm: nn.Module, *, whole: bool) -> None:
        super().__init__()
        bare = shallow_clone(norm)  # without the norm's hooks, which have already run when this module is called
        bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
        self._bare, self._whole = (bare,), whole  # in a tuple: the norm's parameters must not get a second name
        for name, parameter in norm.named_parameters():
            change = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            self.register_parameter(name, nn.Parameter(change))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the changed norm's output, (..., features), or its difference from the frozen norm's output."""
        bare = self._bare[0]
        plain = {name: p if self._whole else p.to(hidden.dtype) for name, p in bare.named_parameters()}
        changed = {name: p + getattr(self, name) for name, p in plain.items()}
        after: torch.Tensor = functional_call(bare, changed, (hidden,))
        return after if self._whole else after - functional_call(bare, plain, (hidden,))


def attach_blocks(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Trains a change, zero at the start, of every dense layer and norm of the slots, or of the targets in the slots.

    The base weights stay as they are and the changes are float32, so a step below the base's precision is not lost, and
    the upload is already a change. A float32 dense layer and its change take one product; in other dtypes, and on
    layers that are stored as codes, the change takes a product of its own. Xiao et al. 2023, arXiv 2302.04870, section
    3.2.

    Raises:
      UnsupportedModel: the slots hold parameters of other kinds of layers, which would silently stay untrained.
    """
    candidates = in_slots(model, spec.slots, lambda module: is_linear(module) or is_norm(module))
    tuned = choose(candidates, spec, leaf_names(candidates))
    if not spec.targets:
        _refuse_others(model, spec)
    for module in tuned.values():
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
    """Whether weight and change may be added before the product; in 16 bits the sum would round the change away."""
    return type(module) in (nn.Linear, Conv1D) and module.get_parameter("weight").dtype == torch.float32


def _refuse_others(model: nn.Module, spec: AdapterSpec) -> None:
    layers = in_slots(model, spec.slots, lambda module: any(True for _ in module.parameters(recurse=False)))
    for name, module in layers.items():
        if not (is_linear(module) or is_norm(module)):
            raise UnsupportedModel(
                f"layer={name!r} is a {type(module).__name__}, must be a dense layer or a norm for method 'blocks'; "
                "name targets to train only these layers"
            )
