"""A small module beside, behind or instead of a frozen layer, which stays as it is."""

import copy
from collections import OrderedDict
from types import MethodType
from typing import Any

import torch
from torch import nn

from offsite.adapter.inject import OWN

BESIDE = f"{OWN}update"  # name of the child; part of every parameter name


def add_parallel(layer: nn.Module, child: nn.Module) -> None:
    """Adds a child that maps the layer's input to what is added to its output, shape (..., outputs).

    The child gets its input in the dtype of its own parameters; the sum has the layer's.
    """
    layer.add_module(BESIDE, child)
    layer.register_forward_hook(_added)


def add_sequential(layer: nn.Module, child: nn.Module) -> None:
    """Adds a child that maps the layer's output to what is added to it, same shape; dtypes as in `add_parallel`."""
    layer.add_module(BESIDE, child)
    layer.register_forward_hook(_added_behind)


def replace_forward(layer: nn.Module, child: nn.Module) -> None:
    """Adds a child that computes the layer's whole output from the layer's input; the layer's own forward rests."""
    layer.add_module(BESIDE, child)
    layer.forward = MethodType(_instead, layer)  # a bound method, which a deep copy binds to the copied layer


def shallow_clone_at(model: nn.Module, path: str) -> nn.Module:
    """Returns a twin that stands from now on in the place of a module outside the slots, to add something to.

    The module and those around it are not touched: twins that share their parameters stand in their places. So a model
    whose own attributes and slots are put back, as `emulator.fidelity.visiting` does, is the model it was.
    """
    holder = model
    holder._modules = dict(holder._modules)
    for name in path.split("."):
        found = shallow_clone(holder.get_submodule(name))
        holder._modules[name] = found
        holder = found
    return holder


def shallow_clone(module: nn.Module) -> nn.Module:
    """Returns another module with the same parameters, buffers and children, which may get hooks and children alone."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    found._forward_hooks = OrderedDict(module._forward_hooks)
    return found


def is_side_module(name: str) -> bool:
    """Whether a parameter's name is one of a child that `add_parallel` added."""
    return f".{BESIDE}." in f".{name}"


def zero_linear(inputs: int, outputs: int, *, bias: bool, device: torch.device) -> nn.Linear:
    """Returns a float32 dense layer whose output is zero; nothing is drawn for it."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=torch.float32, device=device)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _added(layer: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Forward hook; a module-level function, so that a deep copy of the model uses its own child."""
    return output + _update(layer, inputs[0]).to(output.dtype)


def _added_behind(layer: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output + _update(layer, output).to(output.dtype)


def _update(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    child = layer.get_submodule(BESIDE)
    update: torch.Tensor = child(inputs.to(next(child.parameters()).dtype))
    return update


def _instead(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = layer.get_submodule(BESIDE)(inputs)
    return output
