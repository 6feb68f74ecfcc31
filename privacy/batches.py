"""What a batch must offer, so that engines can tell its examples apart."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import nn


class Batch(Protocol):
    """Examples of which any can be left out, as `task.examples.Examples`."""

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def select(self, indices: Any, /) -> Any:
        """Returns the batch of the examples at these integer indices."""
        ...


B = TypeVar("B", bound=Batch)
Losses = Callable[[nn.Module, Any], torch.Tensor]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that train, by name, each once, in the order of `named_parameters`."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
