"""A task's public examples as what a build needs of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from task.examples import Examples
from task.spec import Task


@dataclass(frozen=True)
class PublicExamples:
    """Examples of the coordinator's own.

    Attributes:
      task: whose losses count.
      examples: of one length.
      batch: how many go through a model at once.
      gradients: how many of them are used where gradients are compared.
    """

    task: Task
    examples: Examples
    batch: int = 8
    gradients: int = 8

    def run(self, model: nn.Module) -> None:
        """Calls a model with all examples, for what its blocks do with them."""
        for batch in self._batches(len(self.examples), self.batch):
            self.task.run(model, batch)

    def losses(self, model: nn.Module) -> Iterator[torch.Tensor]:
        """Yields the mean loss over the first `gradients` examples in pieces of two, whose sum is the mean."""
        count = min(self.gradients, len(self.examples))
        for batch in self._batches(count, 2):
            yield self.task.losses(model, batch).sum() / count

    def loss(self, model: Any) -> float:
        """Returns the mean loss per target token over all examples, nats."""
        total, tokens = 0.0, 0
        for batch in self._batches(len(self.examples), self.batch):
            sums, count = self.task.token_losses(model, batch)
            total, tokens = total + sums, tokens + count
        return total / max(tokens, 1)

    def _batches(self, count: int, size: int) -> Iterator[Examples]:
        for start in range(0, count, size):
            yield self.examples.select(list(range(start, min(start + size, count))))
