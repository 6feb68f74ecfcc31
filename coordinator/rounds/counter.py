"""A counter whose numbers never come twice, whatever is killed when."""

import time
from collections.abc import Callable
from pathlib import Path

from offsite.coordinator.job.store import write_atomically
from offsite.errors import DataError


class MonotonicCounter:
    """Whole numbers that only go up, over restarts too: of letters, and of aggregations.

    They start at the clock and are kept in a file, so that neither a clock that was set back nor a lost file makes a
    number come again unless both happen at once; a site then refuses until the clock has caught up.
    """

    def __init__(self, path: Path, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._path, self._clock_ns = path, clock_ns

    def next(self) -> int:
        """Returns the next number, durably.

        Raises:
          DataError: the file is damaged, or cannot be written.
        """
        number = max(self._last() + 1, self._clock_ns())
        write_atomically(self._path, str(number).encode("ascii"))
        return number

    def _last(self) -> int:
        if not self._path.exists():
            return 0
        try:
            return int(self._path.read_bytes().decode("ascii"))
        except ValueError as error:
            raise DataError(
                f"numbers={str(self._path)!r} is damaged; remove it: numbers then go on at the clock, which is later"
            ) from error
