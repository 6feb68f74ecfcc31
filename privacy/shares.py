"""Shares of a step: the records of one step divided among the processes of a site, each with the same model.

One process draws the records, adds the noise and moves the adapter. Each process adds up what its own share of the
drawn records gives. What a record gives is a function of this record alone, so the sum over the processes is the sum
of one process but for its rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from offsite.privacy.batches import Batch, trainable
from offsite.privacy.clipped_sum import Counted
from offsite.privacy.per_example import add_to_sum

State = tuple[NDArray[np.float64], ...]


@dataclass(frozen=True)
class Share:
    """What one process computed from its share of a step's records; every field is private.

    Attributes:
      arrays: clipped sums of the trainable parameters, in the model's order, float64; or, by forward passes alone, the
        records' slopes, float64 (b, K).
      counted: the examples in them.
    """

    arrays: State
    counted: Counted


class Worker(Protocol):
    """A further process of the site, which has begun the same training on the same model."""

    def send(self, state: State, records: Batch) -> None:
        """Gives the process its share of a step, without waiting for the result.

        Args:
          state: the trained numbers as they are before the step.
          records: records of the share, which may be empty.

        Raises:
          TrainingFault: the process has ended.
        """
        ...

    def receive(self) -> Share:
        """Returns the result of the share that was sent.

        Raises:
          MemoryError, PrivacyRefusal, TrainingFault: as `privacy.clipped_sum.ClippedSum.add`, at the other process;
            TrainingFault also where the process has ended.
        """
        ...


Compute = Callable[[State, Batch], Share]


def divided(drawn: NDArray[np.int64], workers: Sequence[Worker]) -> list[NDArray[np.int64]]:
    """Returns the records of this process and of each worker, in order, as equal in number as can be."""
    return np.array_split(drawn, 1 + len(workers))


def parameter_state(model: nn.Module) -> State:
    """Returns the trainable parameters, float64, which holds every narrower number exactly."""
    return tuple(parameter.detach().cpu().double().numpy() for parameter in trainable(model).values())


def put_state(model: nn.Module, state: State) -> None:
    """Writes `parameter_state` of another process into the trainable parameters, bit for bit."""
    with torch.no_grad():
        for parameter, values in zip(trainable(model).values(), state, strict=True):
            parameter.copy_(torch.from_numpy(values))


def add_share(model: nn.Module, share: Share) -> None:
    """Adds another process' clipped sums to this process' `p.summed_grad`."""
    for parameter, total in zip(trainable(model).values(), share.arrays, strict=True):
        add_to_sum(parameter, torch.from_numpy(total).to(parameter.device))


def taken_sums(model: nn.Module) -> State:
    """Returns the trainable parameters' sums, zero where nothing was added, and removes them from the parameters."""
    return tuple(_taken(parameter) for parameter in trainable(model).values())


def _taken(parameter: nn.Parameter) -> NDArray[np.float64]:
    total = parameter.__dict__.pop("summed_grad", None)
    return np.zeros(tuple(parameter.shape)) if total is None else total.cpu().numpy()
