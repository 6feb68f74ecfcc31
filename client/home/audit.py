"""The audit log, which tells a site's owner what the site did and why; it never holds data, keys or weights."""

from datetime import datetime
from pathlib import Path
from typing import Any

from offsite.trust.chain import Chain, Link

_LABEL = "offsite audit"


class Audit:
    """The audit log of one site, a hash-chained file.

    Args:
      path: file of the log.
    """

    def __init__(self, path: Path) -> None:
        self._chain = Chain(path, _LABEL)

    def record(self, kind: str, *, now: datetime, **fields: Any) -> Link:
        """Adds an entry, durably.

        Raises:
          DataError: the log is damaged or the disk is full; the recorded action must then not happen.
        """
        return self._chain.append(kind, fields, now=now)

    def entries(self) -> list[Link]:
        """Returns all entries, each verified anew.

        Raises:
          DataError: an entry was changed after it was written.
        """
        return self._chain.links()


def verify(path: Path) -> int:
    """Checks the whole chain of an audit log and returns the number of its entries.

    Raises:
      DataError: an entry was changed after it was written.
    """
    return len(Chain(path, _LABEL).links())
