"""How good a model is on some examples, in the task's own measures."""

import functools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from offsite.errors import DataError
from offsite.task.spec import Batch, Tally, Task

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class Score:
    """How good a model is.

    Attributes:
      loss: mean over all targets, nats.
      targets: their number.
      metrics: the task's further measures, by name; see `task.spec.Tally.means`.
    """

    loss: float
    targets: int
    metrics: Mapping[str, float] = field(default_factory=dict)


def score(task: Task, model: nn.Module, *parts: Batch, batch: int) -> Score:
    """Returns the score of a model over all parts, in chunks of `batch` examples so that memory stays small.

    Raises:
      DataError: no example has anything to be scored on.
    """
    if not any(part.targets.any() for part in parts):
        raise DataError(f"records={sum(map(len, parts))}: none has anything to learn; give longer or other ones")
    tallies = (task.tally(model, chunk) for part in parts for chunk in _chunks(part, batch))
    total = functools.reduce(operator.add, tallies, Tally(0.0, 0))
    return Score(total.loss / total.targets, total.targets, total.means())


def spread(examples: B, count: int, *, offset: int = 0, stride: int = 1) -> B:
    """Returns at most `count` examples, evenly spaced over those with index = offset modulo stride.

    Two calls with the same stride and different offsets never share an example.
    """
    return examples.select(spread_rows(np.arange(offset, len(examples), stride), count))


def spread_rows(eligible: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Returns at most `count` of some rows, evenly spaced."""
    if len(eligible) > count:
        eligible = eligible[np.linspace(0, len(eligible) - 1, count).astype(int)]
    return eligible


def _chunks(examples: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(examples), size):
        yield examples.select(np.arange(start, min(start + size, len(examples))))
