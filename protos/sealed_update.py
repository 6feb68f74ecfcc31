"""A site's own update on its way to the coordinator: closed to everybody between, and for one round of one job only."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from offsite.errors import RangeError
from offsite.secagg.params import SecAggParams
from offsite.trust.sealing import HYBRID, PUBLIC_BYTES, SealingKey, seal
from offsite.trust.wire import Writer

UPDATE = "update"  # the step under which a site signs the hash of its box, in the place of the masked upload
SUITE = HYBRID  # also where a federation's packages are of suite 1: a recorded update would stay worth opening
KEY_BYTES = PUBLIC_BYTES[SUITE]
_LABEL = "offsite sealed update"
_ENTRY_BYTES, _TAG_BYTES, _ENCAPSULATED_BYTES = 4, 16, 1088 + 32  # X-Wing: of ML-KEM-768 and of X25519


def key_of(secret: bytes) -> SealingKey:
    """Returns the key of an attempt from its 32 secret bytes; its public half goes into the request."""
    return SealingKey(SUITE, secret)


def close(update: NDArray[np.float32], terms: SecAggParams, site: str, sealing: bytes) -> bytes:
    """Returns the box of an update, which only the coordinator opens, and only as this site's of this round.

    HPKE binds the round's T0 and the site's name (RFC 9180, section 5.1: info), so a box that is moved does not open.

    Args:
      update: float32 (d,).
      terms: of the round.
      site: whose update it is.
      sealing: public key of the request, `KEY_BYTES` long.

    Raises:
      Untrusted: the public key is none.
    """
    return seal(SUITE, sealing, np.ascontiguousarray(update, dtype="<f4").tobytes(), _info(terms, site))


def unclose(box: bytes, terms: SecAggParams, site: str, key: SealingKey) -> NDArray[np.float32]:
    """Returns the update in a box; its entries are not checked.

    Args:
      box: as it came.
      terms: of the round.
      site: who was asked.
      key: of the attempt.

    Returns:
      float32 (d,), read-only; d is that of the terms.

    Raises:
      RangeError: an update of another length.
      Untrusted: it does not open: another key, round or site, or it was altered.
    """
    entries, rest = divmod(len(box) - _TAG_BYTES - _ENCAPSULATED_BYTES, _ENTRY_BYTES)
    if rest or entries != terms.length:
        raise RangeError(f"box={len(box)} bytes: not an update of {terms.length} entries; use the agreed layout")
    return np.frombuffer(key.open(box, _info(terms, site)), dtype="<f4")


def digest_of(box: bytes) -> bytes:
    """Returns what a site signs of its box: the SHA-256, 32 bytes."""
    return hashlib.sha256(box).digest()


def _info(terms: SecAggParams, site: str) -> bytes:
    return Writer().text(_LABEL).field(terms.t0()).text(site).done()
