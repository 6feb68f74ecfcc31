"""The update that a hostile site sends in the place of its own, as far out as a job permits."""

import numpy as np


def poison(size: int, bound: float) -> np.ndarray:
    """Returns float32 (size,): every entry at the bound, one way or the other; of a dozen draws the most harmful."""
    return np.float32(bound) * np.random.default_rng(8).choice(np.array([-1, 1], dtype=np.float32), size)
