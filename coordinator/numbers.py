"""Numbers that never come twice, whatever is killed when."""

import time
from collections.abc import Callable
from pathlib import Path

from coordinator.store import write_atomically


class Numbers:
    """Whole numbers that only go up, over restarts too: of letters, and of aggregations.

    They start at the clock and are kept in a file, so that neither a clock that was set back nor a lost file makes a
    number come again unless both happen at once; a site then refuses until the clock has caught up.
    """

    def __init__(self, path: Path, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._path, self._clock_ns = path, clock_ns

    def next(self) -> int:
        """Returns the next number, durably."""
        last = int(self._path.read_text(encoding="ascii")) if self._path.exists() else 0
        number = max(last + 1, self._clock_ns())
        write_atomically(self._path, str(number).encode("ascii"))
        return number
