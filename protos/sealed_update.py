"""A site's own update on its way to the coordinator, sealed for one round of one job."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from offsite.errors import RangeError
from offsite.secagg.params import SecAggParams
from offsite.trust.sealing import HYBRID, PUBLIC_BYTES, SealingKey, seal
from offsite.trust.wire import Writer

UPDATE = "update"  # the step under which a site signs the hash of its box, in place of a masked upload's
SUITE = HYBRID  # also in a federation of suite 1: a recorded update would stay worth opening
KEY_BYTES = PUBLIC_BYTES[SUITE]
_LABEL = "offsite sealed update"
_ENTRY_BYTES, _TAG_BYTES, _ENCAPSULATED_BYTES = 4, 16, 1088 + 32  # X-Wing: ML-KEM-768 and X25519


def key_of(secret: bytes) -> SealingKey:
    """Returns the key of an attempt from its 32 secret bytes; the request carries its public half."""
    return SealingKey(SUITE, secret)


def close(update: NDArray[np.float32], terms: SecAggParams, site: str, sealing: bytes) -> bytes:
    """Returns the box of an update, which only the coordinator can open, and only as this site's update of this round.

    HPKE binds the round's T0 and the site's name (RFC 9180, section 5.1: info), so a box that is moved does not open.

    Args:
      update: float32 (d,).
      terms: terms of the round.
      site: name of the update's site.
      sealing: public key of the request, `KEY_BYTES` long.

    Raises:
      Untrusted: the public key is not usable.
    """
    return seal(SUITE, sealing, np.ascontiguousarray(update, dtype="<f4").tobytes(), _info(terms, site))


def unclose(box: bytes, terms: SecAggParams, site: str, key: SealingKey) -> NDArray[np.float32]:
    """Returns the update in a box; the caller checks its entries.

    Args:
      box: sealed bytes as they arrived.
      terms: terms of the round.
      site: name of the site that was asked.
      key: key of the attempt.

    Returns:
      Read-only float32 (d,), with the d of the terms.

    Raises:
      RangeError: the update has another length.
      Untrusted: the box was sealed to another key, round or site, or was altered.
    """
    entries, rest = divmod(len(box) - _TAG_BYTES - _ENCAPSULATED_BYTES, _ENTRY_BYTES)
    if rest or entries != terms.length:
        raise RangeError(f"box={len(box)} bytes: not an update of {terms.length} entries; use the agreed layout")
    return np.frombuffer(key.open(box, _info(terms, site)), dtype="<f4")


def digest_of(box: bytes) -> bytes:
    """Returns the SHA-256 of a box, 32 bytes, which the site signs."""
    return hashlib.sha256(box).digest()


def _info(terms: SecAggParams, site: str) -> bytes:
    return Writer().text(_LABEL).field(terms.t0()).text(site).done()
