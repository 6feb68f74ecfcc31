"""The server rules over the mean update: how the secure sum becomes the next adapter."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ServerState:
    """What a rule remembers between rounds.

    Attributes:
      adapter: current adapter, float32 (d,).
      first: running mean of updates (momentum), float64 (d,).
      second: running mean of squared updates, float64 (d,).
      rounds: updates taken in so far.
    """

    adapter: np.ndarray
    first: np.ndarray
    second: np.ndarray
    rounds: int = 0

    @classmethod
    def start(cls, adapter: np.ndarray) -> "ServerState":
        """Returns the state before the first round."""
        zeros = np.zeros(adapter.shape, dtype=np.float64)
        return cls(adapter.astype(np.float32), zeros, zeros.copy())


@dataclass(frozen=True)
class Rates:
    """Step size and momentum of a rule."""

    learning_rate: float
    momentum: float


Aggregator = Callable[[ServerState, np.ndarray, Rates], ServerState]


def mean(state: ServerState, update: np.ndarray, rates: Rates) -> ServerState:
    """Adds the mean update as it is (FedAvg, McMahan et al. 2017, algorithm 1); both rates are ignored."""
    adapter = (state.adapter + update).astype(np.float32)
    return ServerState(adapter, state.first, state.second, state.rounds + 1)


def fedavgm(state: ServerState, update: np.ndarray, rates: Rates) -> ServerState:
    """Server momentum over the mean update (Hsu et al. 2019, section 4.3)."""
    first = rates.momentum * state.first + update
    adapter = (state.adapter + rates.learning_rate * first).astype(np.float32)
    return ServerState(adapter, first, state.second, state.rounds + 1)


SECOND_MOMENT = 0.999
ADAM_FLOOR = 1e-12


def fedadam(state: ServerState, update: np.ndarray, rates: Rates) -> ServerState:
    """Adam over the mean update as a pseudo-gradient (Reddi et al. 2021, algorithm 2), bias-corrected.

    The second moment sees the DP noise too; that only makes the step smaller where noise dominates.
    """
    count = state.rounds + 1
    first = rates.momentum * state.first + (1 - rates.momentum) * update
    second = SECOND_MOMENT * state.second + (1 - SECOND_MOMENT) * np.square(update)
    corrected = first / (1 - rates.momentum**count)
    scale = np.sqrt(second / (1 - SECOND_MOMENT**count)) + ADAM_FLOOR
    adapter = (state.adapter + rates.learning_rate * corrected / scale).astype(np.float32)
    return ServerState(adapter, first, second, count)


AGGREGATORS: dict[str, Aggregator] = {"mean": mean, "fedavgm": fedavgm, "fedadam": fedadam}
