"""For a while only the first columns of each LoRA factor B train, as for a site of smaller rank."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from offsite.errors import UnsupportedModel


class Columns(nn.Module):
    """A linear layer in two: its first columns, which train, and the others, which stay as the round began."""

    def __init__(self, whole: nn.Linear, rank: int) -> None:
        super().__init__()
        weight = whole.weight.detach()
        # Two layers and not a slice of one, so that each engine finds a plain layer whose gradient is all there is.
        self.first = nn.Linear(rank, weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
        self.first.weight = nn.Parameter(weight[:, :rank].clone())
        self.register_buffer("others", weight[:, rank:].clone(), persistent=False)
        self.rank = rank
        self.train(whole.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns what the whole layer gives, (..., out), of (..., columns)."""
        others: Tensor = self.others
        found: Tensor = self.first(inputs[..., : self.rank])
        return found + nn.functional.linear(inputs[..., self.rank :], others)


@contextmanager
def first_columns(model: nn.Module, rank: int) -> Iterator[None]:
    """Puts a layer in the place of each B of which only the first columns train."""
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
