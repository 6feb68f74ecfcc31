"""Rules that use the mean update only, so that a secure sum is enough."""

import numpy as np
from numpy.typing import NDArray

from offsite.coordinator.aggregation.state import RuleSettings, ServerState

SECOND_MOMENT = 0.999
ADAM_FLOOR = 1e-12


def mean(state: ServerState, update: NDArray[np.float64], settings: RuleSettings) -> ServerState:
    """Adds the mean update as it is (FedAvg, McMahan et al. 2017, algorithm 1); uses no setting."""
    return state.moved(update)


def fedavgm(state: ServerState, update: NDArray[np.float64], settings: RuleSettings) -> ServerState:
    """Server momentum over the mean update (Hsu et al. 2019, section 4.3)."""
    first = settings.momentum * state.first + update
    adapter = (state.adapter + settings.learning_rate * first).astype(np.float32)
    return ServerState(adapter, first, state.second, state.rounds + 1)


def fedadam(state: ServerState, update: NDArray[np.float64], settings: RuleSettings) -> ServerState:
    """Adam over the mean update as a pseudo-gradient (Reddi et al. 2021, algorithm 2), bias-corrected.

    The second moment sees the DP noise too; that only makes the step smaller where noise dominates.
    """
    second = SECOND_MOMENT * state.second + (1 - SECOND_MOMENT) * np.square(update)
    return _adaptive(state, update, second, settings)


def fedyogi(state: ServerState, update: NDArray[np.float64], settings: RuleSettings) -> ServerState:
    """Yogi over the mean update (Reddi et al. 2021, algorithm 2): the second moment forgets no faster than it learns.

    It has the bias correction of Adam, which the algorithm leaves out, so that the first step is as long as fedadam's.
    """
    square = np.square(update)
    second = state.second - (1 - SECOND_MOMENT) * square * np.sign(state.second - square)
    return _adaptive(state, update, second, settings)


def _adaptive(
    state: ServerState, update: NDArray[np.float64], second: NDArray[np.float64], settings: RuleSettings
) -> ServerState:
    count = state.rounds + 1
    first = settings.momentum * state.first + (1 - settings.momentum) * update
    corrected = first / (1 - settings.momentum**count)
    scale = np.sqrt(second / (1 - SECOND_MOMENT**count)) + ADAM_FLOOR
    adapter = (state.adapter + settings.learning_rate * corrected / scale).astype(np.float32)
    return ServerState(adapter, first, second, count)
