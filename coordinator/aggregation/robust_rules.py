"""Rules that compare the sites' updates, so that a few bad updates do not decide; such a rule cannot work on a sum."""

import numpy as np
from numpy.typing import NDArray

from offsite.coordinator.aggregation.state import RuleSettings, ServerState
from offsite.errors import TooFewSurvivors


def krum(state: ServerState, updates: NDArray[np.float64], settings: RuleSettings) -> ServerState:
    """Adds the single update that is nearest to most others (Blanchard et al. 2017, section 4).

    The score of an update is the sum of squared distances to its n - f - 2 nearest others. The least score wins, and of
    equal scores the first in the order of the sites. The updates of all other sites are lost.

    Args:
      state: state before the round.
      updates: float64 (n, d).
      settings: rule settings, whose `faulty` is f.

    Raises:
      TooFewSurvivors: n < 2 f + 3, for which the paper promises nothing.
    """
    count, faulty = len(updates), settings.faulty
    if count < 2 * faulty + 3:
        raise TooFewSurvivors(f"updates={count}: krum with faulty={faulty} needs {2 * faulty + 3}; wait for more sites")
    products = updates @ updates.T
    squares = np.diag(products)
    distances = np.sort(squares[:, None] + squares[None, :] - 2 * products + np.diag([np.inf] * count), axis=1)
    return state.moved(updates[int(np.argmin(distances[:, : count - faulty - 2].sum(axis=1)))])


def median(state: ServerState, updates: NDArray[np.float64], settings: RuleSettings) -> ServerState:
    """Adds the median of each entry (Yin et al. 2018, definition 1) of updates, float64 (n, d); uses no setting."""
    return state.moved(np.median(updates, axis=0))


def trimmed_mean(state: ServerState, updates: NDArray[np.float64], settings: RuleSettings) -> ServerState:
    """Adds the mean of each entry without its f largest and f smallest values (Yin et al. 2018, definition 2).

    Args:
      state: state before the round.
      updates: float64 (n, d).
      settings: rule settings, whose `faulty` is f.

    Raises:
      TooFewSurvivors: n <= 2 f, which leaves no value.
    """
    count, faulty = len(updates), settings.faulty
    if count <= 2 * faulty:
        raise TooFewSurvivors(
            f"updates={count}: trimming faulty={faulty} at both ends leaves no update; wait for more sites"
        )
    return state.moved(np.sort(updates, axis=0)[faulty : count - faulty].mean(axis=0))
