"""How good a model is on some examples, in nats per token."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from errors import DataError
from task.examples import Examples
from task.spec import Task


@dataclass(frozen=True)
class Score:
    """Mean loss over target tokens in nats, its exponential, and the number of targets."""

    loss: float
    perplexity: float
    tokens: int


def score(task: Task, model: nn.Module, examples: Examples, *, batch: int) -> Score:
    """Returns the score of a model, in chunks of `batch` examples so that memory stays small.

    Raises:
      DataError: no example has a token to predict.
    """
    if not examples.targets.any():
        raise DataError(f"records={len(examples)}: none has a token to predict; give longer texts")
    total, tokens = 0.0, 0
    for start in range(0, len(examples), batch):
        rows = np.arange(start, min(start + batch, len(examples)))
        sums, count = task.token_losses(model, examples.select(rows))
        total, tokens = total + sums, tokens + count
    loss = total / tokens
    return Score(loss, math.exp(min(loss, 700.0)), tokens)


def spread(examples: Examples, count: int, *, offset: int = 0, stride: int = 1) -> Examples:
    """Returns at most `count` examples, evenly spaced over those with index = offset modulo stride.

    Two calls with the same stride and different offsets never share an example.
    """
    return examples.select(spread_rows(np.arange(offset, len(examples), stride), count))


def spread_rows(eligible: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Returns at most `count` of some rows, evenly spaced."""
    if len(eligible) > count:
        eligible = eligible[np.linspace(0, len(eligible) - 1, count).astype(int)]
    return eligible
