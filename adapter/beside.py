"""A small module beside a frozen layer, whose output is added to the layer's own."""

from typing import Any

import torch
from torch import nn

from adapter.inject import OWN

BESIDE = f"{OWN}update"  # name of the child; part of every parameter name


def add_beside(layer: nn.Module, child: nn.Module) -> None:
    """Adds a child that maps the layer's input to what is added to its output, shape (..., outputs).

    The child gets its input in the dtype of its own parameters; the sum has the layer's.
    """
    layer.add_module(BESIDE, child)
    layer.register_forward_hook(_added)


def is_beside(name: str) -> bool:
    """Whether a parameter's name is one of a child that `add_beside` added."""
    return f".{BESIDE}." in f".{name}"


def zero_linear(inputs: int, outputs: int, *, bias: bool, device: torch.device) -> nn.Linear:
    """Returns a float32 dense layer whose output is zero; nothing is drawn for it."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=torch.float32, device=device)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _added(layer: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Forward hook; a module-level function, so that a deep copy of the model uses its own child."""
    child = layer.get_submodule(BESIDE)
    update: torch.Tensor = child(inputs[0].to(next(child.parameters()).dtype))
    return output + update.to(output.dtype)
