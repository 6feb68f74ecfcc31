"""What a site did and why, for its owner: a hash-chained file that never holds data, keys or weights."""

from datetime import datetime
from pathlib import Path
from typing import Any

from offsite.trust.chain import Chain, Link

_LABEL = "offsite audit"


class Audit:
    """The audit log of one site.

    Args:
      path: its file.
    """

    def __init__(self, path: Path) -> None:
        self._chain = Chain(path, _LABEL)

    def record(self, kind: str, *, now: datetime, **fields: Any) -> Link:
        """Adds an entry, durably.

        Raises:
          DataError: the log is damaged or the disk full; what was about to happen must then not happen.
        """
        return self._chain.append(kind, fields, now=now)


def verify(path: Path) -> int:
    """Checks the whole chain of an audit log and returns the number of its entries.

    Raises:
      DataError: an entry is not the one that was written.
    """
    return len(Chain(path, _LABEL).links())
