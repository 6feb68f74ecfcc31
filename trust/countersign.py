"""The coordinator's signature of a site's ledger head, against which a restored old copy is seen."""

from offsite.trust.identity import Identity, verify
from offsite.trust.wire import Writer

_LABEL = "offsite ledger head"


def countersign(identity: Identity, site: str, ledger: str, count: int, head: str) -> bytes:
    """Returns the signature that a site's ledger had so many entries and this head, 64 bytes."""
    return identity.sign(_signed(site, ledger, count, head))


def check_countersigned(coordinator: bytes, site: str, ledger: str, count: int, head: str, signature: bytes) -> None:
    """Checks such a signature.

    Raises:
      ProtocolViolation: it is not the coordinator's over these values.
    """
    verify(coordinator, _signed(site, ledger, count, head), signature, sender="coordinator")


def _signed(site: str, ledger: str, count: int, head: str) -> bytes:
    return Writer().text(_LABEL).text(site).text(ledger).number(count).text(head).done()
