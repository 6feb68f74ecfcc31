"""The score of a model on some examples, in the task's own measures."""

import functools
import operator
from collections.abc import Iterator

import numpy as np
from torch import nn

from offsite.coordinator.job.score import Score
from offsite.errors import DataError
from offsite.task.spec import Batch, Tally, Task


def score(task: Task, model: nn.Module, *parts: Batch, batch: int) -> Score:
    """Returns the score of a model over all parts, computed in chunks of `batch` examples so that memory stays small.

    Raises:
      DataError: no example has a target.
    """
    if not any(part.targets.any() for part in parts):
        raise DataError(
            f"records={sum(map(len, parts))}: no record has anything to learn; give longer records or other records"
        )
    tallies = (task.tally(model, chunk) for part in parts for chunk in _chunks(part, batch))
    total = functools.reduce(operator.add, tallies, Tally(0.0, 0))
    return Score(total.loss / total.targets, total.targets, total.means())


def _chunks(examples: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(examples), size):
        yield examples.select(np.arange(start, min(start + size, len(examples))))
