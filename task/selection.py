"""Selects evenly spaced examples from a batch."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from offsite.task.spec import Batch

B = TypeVar("B", bound=Batch)


def spread(examples: B, count: int, *, offset: int = 0, stride: int = 1) -> B:
    """Returns at most `count` examples, evenly spaced over the examples with index = offset modulo stride.

    Two calls with the same stride and different offsets never share an example.
    """
    return examples.select(spread_rows(np.arange(offset, len(examples), stride), count))


def spread_rows(eligible: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Returns at most `count` of the row numbers `eligible`, evenly spaced."""
    if len(eligible) > count:
        eligible = eligible[np.linspace(0, len(eligible) - 1, count).astype(int)]
    return eligible
