"""An aggregation rule's state between rounds, and its settings."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offsite.adapter.layout import Layout


@dataclass(frozen=True)
class ServerState:
    """An aggregation rule's state between rounds.

    Attributes:
      adapter: current adapter, float32 (d,).
      first: running mean of updates (momentum), float64 (d,).
      second: running mean of squared updates, float64 (d,).
      rounds: number of updates taken in so far.
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

    def moved(self, update: NDArray[np.float64]) -> "ServerState":
        """Returns the state after adding an update, float64 (d,), to the adapter; no running mean changes."""
        return self.at(self.adapter + update)

    def at(self, adapter: NDArray[np.float64]) -> "ServerState":
        """Returns the state with another adapter, float64 (d,); no running mean changes."""
        return ServerState(adapter.astype(np.float32), self.first, self.second, self.rounds + 1)


@dataclass(frozen=True)
class RuleSettings:
    """The settings of all rules; each rule uses the settings that it needs.

    Attributes:
      learning_rate: step size of the rules with moments, > 0.
      momentum: momentum of the rules with moments, in [0, 1).
      faulty: number of sites that may send any update at all.
      penalty: weight lambda of the penalty on the adapter itself, > 0 for the rules that use it.
      layout: layout of the adapter, for rules that use its factors.
      earlier: factors A of each earlier adapter, float32 (rank, in), by their names in the layout.
    """

    learning_rate: float
    momentum: float
    faulty: int = 0
    penalty: float = 0.0
    layout: Layout | None = None
    earlier: tuple[Mapping[str, NDArray[np.float32]], ...] = ()
