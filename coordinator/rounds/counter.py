"""A counter whose numbers never come twice, whenever its process is killed."""

import time
from collections.abc import Callable
from pathlib import Path

from offsite.errors import DataError
from offsite.trust.files import write_atomically


class MonotonicCounter:
    """Whole numbers that only go up, over restarts too; they number signed messages and aggregations.

    Numbers start at the clock and are kept in a file, so that a number comes again only if the clock is set back and
    the file is lost at once; sites then refuse until the clock has caught up.

    Args:
      path: file with the last number.
      clock_ns: returns nanoseconds since 1970.
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
