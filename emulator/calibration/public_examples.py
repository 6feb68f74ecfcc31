"""A task's public examples as what a build needs of them."""

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offsite.task.spec import Batch, Tally, Task


@dataclass(frozen=True)
class PublicExamples:
    """Examples of the coordinator's own.

    Attributes:
      task: whose losses count.
      examples: of the task.
      batch: how many go through a model at once.
      gradients: how many of them are used where gradients are compared.
    """

    task: Task
    examples: Batch
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
        """Returns the mean loss per target over all examples, nats."""
        tallies = (self.task.tally(model, batch) for batch in self._batches(len(self.examples), self.batch))
        total = functools.reduce(operator.add, tallies, Tally(0.0, 0))
        return total.loss / max(total.targets, 1)

    def _batches(self, count: int, size: int) -> Iterator[Batch]:
        for start in range(0, count, size):
            yield self.examples.select(list(range(start, min(start + size, count))))
