"""What a server rule remembers between rounds, and what it is told beside the updates."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offsite.adapter.layout import Layout


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

    def moved(self, update: NDArray[np.float64]) -> "ServerState":
        """Returns the state with an update, float64 (d,), added to the adapter and no mean changed."""
        return self.at(self.adapter + update)

    def at(self, adapter: NDArray[np.float64]) -> "ServerState":
        """Returns the state with another adapter, float64 (d,), and no mean changed."""
        return ServerState(adapter.astype(np.float32), self.first, self.second, self.rounds + 1)


@dataclass(frozen=True)
class RuleSettings:
    """What a rule is told; each uses what it needs.

    Attributes:
      learning_rate: step size of the rules with moments, > 0.
      momentum: of those, in [0, 1).
      faulty: how many sites may send anything at all.
      penalty: weight lambda of what is asked of the adapter itself, > 0.
      layout: of the adapter; for rules that look at its factors.
      earlier: for each earlier adapter its factors A, float32 (rank, in), by their names in the layout.
    """

    learning_rate: float
    momentum: float
    faulty: int = 0
    penalty: float = 0.0
    layout: Layout | None = None
    earlier: tuple[Mapping[str, NDArray[np.float32]], ...] = ()
