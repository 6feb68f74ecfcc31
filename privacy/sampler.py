"""Poisson sampling, the only sampling whose privacy amplification the accountants compute."""

import numpy as np

from offsite.privacy.events import check_sample_rate
from offsite.privacy.randomness import Randomness


def poisson(n: int, sample_rate: float, randomness: Randomness) -> np.ndarray:
    """Returns the records of one step: each of n joins with probability `sample_rate`, independently.

    Args:
      n: number of the site's records, >= 0, empty ones included.
      sample_rate: public constant of the plan, in (0, 1]; never a batch size divided by n.
      randomness: source of one uniform number per record.

    Returns:
      Ascending indices, int64 (size,); the size is random and may be 0.

    Raises:
      ConfigError: the sample rate is out of range.
    """
    check_sample_rate(sample_rate)
    return np.flatnonzero(randomness.uniform(n) < sample_rate)
