"""Frozen bottleneck adapters of earlier jobs inside a new adapter."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.adapter.auxiliary import AuxiliaryTensors, RequiredTensors, TensorSpec
from offsite.adapter.inject import OWN
from offsite.adapter.methods.bottleneck import adapted_output, slot_blocks
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import hidden_size

FROZEN = f"{OWN}frozen"
PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")
HINT = "name the adapter folders of earlier jobs with method 'bottleneck' on these slots in adapter.frozen"


class FrozenBottleneck(nn.Module):
    """hidden + up(gelu(down(hidden))), computed in float32 and equal to `bottleneck.Bottleneck` to the last bit.

    The tensors are buffers and not parameters, so that nothing can make them trainable, and are not in the state dict.
    """

    def __init__(self, auxiliary: AuxiliaryTensors, slot: str, number: int, device: torch.device) -> None:
        super().__init__()
        for part in PARTS:
            tensor = auxiliary[frozen_tensor_name(slot, number, part)]
            self.register_buffer(part.replace(".", "_"), tensor.detach().to(device), persistent=False)

    def update(self, read: Tensor) -> Tensor:
        """Returns the update of hidden states, (..., width), in the dtype of the buffers."""
        narrow = functional.linear(read, self.get_buffer("down_weight"), self.get_buffer("down_bias"))
        return functional.linear(functional.gelu(narrow), self.get_buffer("up_weight"), self.get_buffer("up_bias"))

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the adapted hidden states, same shape (..., width) and dtype."""
        return hidden + self.update(hidden.to(self.get_buffer("down_weight").dtype)).to(hidden.dtype)


def frozen_tensor_name(slot: str, number: int, part: str) -> str:
    """Returns the name of one tensor of the frozen adapter with a number, from 0, after a slot's block."""
    return f"{slot}.frozen_{number}.{part}"


def frozen_specs(model: nn.Module, spec: AdapterSpec, count: int) -> RequiredTensors:
    """Returns the specs of the tensors of `count` bottlenecks, each of any rank, after each slot's block."""
    specs: dict[str, TensorSpec] = {}
    for slot, block in slot_blocks(model, spec).items():
        width = hidden_size(block)
        for number in range(count):
            rank = f"rank_{number}"
            shapes: tuple[tuple[int | str, ...], ...] = ((rank, width), (rank,), (width, rank), (width,))
            specs |= {
                frozen_tensor_name(slot, number, part): TensorSpec(shape)
                for part, shape in zip(PARTS, shapes, strict=True)
            }
    return specs


def add_after_block(block: nn.Module, name: str, child: nn.Module) -> None:
    """Adds a child that changes a block's hidden states, after all children that were added before."""
    block.add_module(name, child)
    # A partial of a module-level function, so that a deep copy of the model uses its own child.
    block.register_forward_hook(partial(_adapted_by, name))


def _adapted_by(name: str, block: nn.Module, inputs: Any, output: Any) -> Any:
    return adapted_output(output, block.get_submodule(name))
