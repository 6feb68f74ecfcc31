"""Trains only the first columns of each LoRA factor B for a while, as a site of smaller rank does."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from offsite.errors import UnsupportedModel


class Columns(nn.Module):
    """A linear layer in two parts: the first columns train, the other columns keep the values of the round's start."""

    def __init__(self, whole: nn.Linear, rank: int) -> None:
        super().__init__()
        weight = whole.weight.detach()
        # A separate layer and not a slice, so that each engine finds a plain layer whose gradient is the whole
        # gradient.
        self.first = nn.Linear(rank, weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
        self.first.weight = nn.Parameter(weight[:, :rank].clone())
        self.register_buffer("others", weight[:, rank:].clone(), persistent=False)
        self.rank = rank
        self.train(whole.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the output of the whole layer, (..., out), for inputs (..., columns)."""
        others: Tensor = self.others
        trained: Tensor = self.first(inputs[..., : self.rank])
        return trained + nn.functional.linear(inputs[..., self.rank :], others)


@contextmanager
def first_columns(model: nn.Module, rank: int) -> Iterator[None]:
    """Replaces each factor B by a layer that trains only its first columns, and writes these back at the end.

    Args:
      model: a model with a LoRA adapter.
      rank: number of columns that train, >= 1.

    Raises:
      UnsupportedModel: the adapter has no factor B that is a plain linear layer without a bias.
    """
    wholes: list[tuple[nn.ModuleDict, str, nn.Linear]] = []
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            wholes += [(layer.lora_B, name, whole) for name, whole in layer.lora_B.items()]
    if not wholes or not all(type(whole) is nn.Linear and whole.bias is None for _, _, whole in wholes):
        raise UnsupportedModel(f"rank={rank}: this adapter has no plain factor B to train in part; ask for another job")
    try:
        for place, name, whole in wholes:
            place[name] = Columns(whole, rank)
        yield
    finally:
        for place, name, whole in wholes:
            if isinstance(part := place[name], Columns):
                with torch.no_grad():
                    whole.weight[:, :rank] = part.first.weight
            place[name] = whole
