"""The coordinator's memory of the sites' privacy ledgers; it shows a site that its own ledger was set back."""

import json
import logging
from pathlib import Path
from typing import Any

from offsite.errors import DataError
from offsite.protos.codec import LedgerHead
from offsite.trust.countersign import countersign
from offsite.trust.files import write_atomically
from offsite.trust.identity import Identity

log = logging.getLogger("offsite.coordinator")
MAX_LEDGERS = 64  # data sets of one site, which the site names; without a limit, a site could fill the disk


class Ledgers:
    """The newest heads of all sites' ledgers; a head says how often a site has released, and nothing about its data.

    For a site with more than `MAX_LEDGERS` data sets, the first `MAX_LEDGERS` are kept.

    Args:
      path: file that keeps the heads.
      identity: identity of the coordinator, which countersigns the heads.

    Raises:
      DataError: the file is damaged.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self._path, self._identity = path, identity
        self._full: set[str] = set()
        try:
            self._heads: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        except ValueError as error:
            raise DataError(
                f"ledgers={str(path)!r} is damaged; restore the file, since without it no site notices a ledger that "
                "was set back"
            ) from error

    def learn(self, site: str, head: LedgerHead | None) -> None:
        """Keeps a site's head if its count is higher than the known count."""
        if head is None:
            return
        ledgers = self._heads.setdefault(site, {})
        if head.ledger not in ledgers and len(ledgers) >= MAX_LEDGERS:
            if site not in self._full:
                log.warning("site %s: has over %d ledgers; heads of further ledgers are not kept", site, MAX_LEDGERS)
            self._full.add(site)
            return
        known = ledgers.get(head.ledger, {"count": 0})
        if head.count > known["count"]:
            ledgers[head.ledger] = {"count": head.count, "head": head.head}
            write_atomically(self._path, json.dumps(self._heads, sort_keys=True).encode())

    def countersigned(self, site: str) -> tuple[LedgerHead, ...]:
        """Returns all known heads of a site's ledgers, with the coordinator's signatures."""
        return tuple(
            LedgerHead(
                name,
                entry["count"],
                entry["head"],
                countersign(self._identity, site, name, entry["count"], entry["head"]),
            )
            for name, entry in sorted(self._heads.get(site, {}).items())
        )
