"""A task's public examples, with the functions that a build needs."""

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
    """Public examples of the coordinator.

    Attributes:
      task: task that computes the losses.
      examples: examples of the task.
      batch: number of examples that go through a model at once.
      gradients: number of examples on which gradients are compared.
    """

    task: Task
    examples: Batch
    batch: int = 8
    gradients: int = 8

    def run(self, model: nn.Module) -> None:
        """Calls a model with all examples; the outputs are dropped."""
        for batch in self._batches(len(self.examples), self.batch):
            self.task.run(model, batch)

    def losses(self, model: nn.Module) -> Iterator[torch.Tensor]:
        """Yields the mean loss over the first `gradients` examples in parts of two examples; the sum is the mean."""
        count = min(self.gradients, len(self.examples))
        for batch in self._batches(count, 2):
            yield self.task.losses(model, batch).sum() / count

    def loss(self, model: Any) -> float:
        """Returns the mean loss over all examples, nats per target."""
        tallies = (self.task.tally(model, batch) for batch in self._batches(len(self.examples), self.batch))
        total = functools.reduce(operator.add, tallies, Tally(0.0, 0))
        return total.loss / max(total.targets, 1)

    def _batches(self, count: int, size: int) -> Iterator[Batch]:
        for start in range(0, count, size):
            yield self.examples.select(list(range(start, min(start + size, count))))
