"""Small modules in parallel to, after or in the place of a frozen layer, whose parameters stay as they are."""

import copy
from collections import OrderedDict
from types import MethodType
from typing import Any

import torch
from torch import nn

from offsite.adapter.inject import OWN

SIDE_MODULE = f"{OWN}update"  # name of the child module; part of every parameter name


def add_parallel(layer: nn.Module, child: nn.Module) -> None:
    """Adds a child that maps the layer's input to an update of the layer's output, shape (..., outputs).

    The child gets its input in the dtype of its own parameters; the sum has the dtype of the layer's output.
    """
    layer.add_module(SIDE_MODULE, child)
    layer.register_forward_hook(_parallel_hook)


def add_sequential(layer: nn.Module, child: nn.Module) -> None:
    """Adds a child that maps the layer's output to an update of it, same shape; dtypes as in `add_parallel`."""
    layer.add_module(SIDE_MODULE, child)
    layer.register_forward_hook(_sequential_hook)


def replace_forward(layer: nn.Module, child: nn.Module) -> None:
    """Adds a child that computes the layer's whole output from its input, in the place of the layer's own forward."""
    layer.add_module(SIDE_MODULE, child)
    layer.forward = MethodType(_replaced_forward, layer)  # a bound method, which a deep copy binds to the copied layer


def shallow_clone_at(model: nn.Module, path: str) -> nn.Module:
    """Replaces a module outside the slots by a shallow clone, to which children may be added, and returns the clone.

    The module and its parents are not touched: clones that share their parameters take their places. So a model whose
    own attributes and slots are put back, as `emulator.evaluation.fidelity.visiting` does, is the model it was.

    Args:
      model: the model that holds the module.
      path: path of the module.
    """
    holder = model
    holder._modules = dict(holder._modules)
    for name in path.split("."):
        clone = shallow_clone(holder.get_submodule(name))
        holder._modules[name] = clone
        holder = clone
    return holder


def shallow_clone(module: nn.Module) -> nn.Module:
    """Returns another module with the same parameters, buffers and children; new hooks and children are its own."""
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    clone._forward_hooks = OrderedDict(module._forward_hooks)
    return clone


def is_side_module(name: str) -> bool:
    """Whether a parameter's name belongs to a child that a function of this file added."""
    return f".{SIDE_MODULE}." in f".{name}"


def zero_linear(inputs: int, outputs: int, *, bias: bool, device: torch.device) -> nn.Linear:
    """Returns a float32 dense layer with all parameters zero; no random value is drawn."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=torch.float32, device=device)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _parallel_hook(layer: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Forward hook; a module-level function, so that a deep copy of the model uses its own child."""
    return output + _update(layer, inputs[0]).to(output.dtype)


def _sequential_hook(layer: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output + _update(layer, output).to(output.dtype)


def _update(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    child = layer.get_submodule(SIDE_MODULE)
    update: torch.Tensor = child(inputs.to(next(child.parameters()).dtype))
    return update


def _replaced_forward(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = layer.get_submodule(SIDE_MODULE)(inputs)
    return output
