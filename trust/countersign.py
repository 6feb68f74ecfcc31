"""The coordinator's signature of a site's ledger head, which exposes a ledger that was restored from an old copy."""

from offsite.trust.identity import Identity, verify
from offsite.trust.wire import Writer

_LABEL = "offsite ledger head"


def countersign(identity: Identity, site: str, ledger: str, count: int, head: str) -> bytes:
    """Returns the coordinator's signature, 64 bytes, that a site's ledger had this number of entries and this head."""
    return identity.sign(_signed(site, ledger, count, head))


def check_countersigned(coordinator: bytes, site: str, ledger: str, count: int, head: str, signature: bytes) -> None:
    """Checks the coordinator's signature of a ledger head.

    Raises:
      ProtocolViolation: the signature is not the coordinator's over these values.
    """
    verify(coordinator, _signed(site, ledger, count, head), signature, sender="coordinator")


def _signed(site: str, ledger: str, count: int, head: str) -> bytes:
    return Writer().text(_LABEL).text(site).text(ledger).number(count).text(head).done()
