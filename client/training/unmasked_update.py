"""An update that leaves a site as it is: sealed to its coordinator, signed, once, and only in a job that says so."""

import hashlib

import numpy as np

from offsite.protos.sealed_update import UPDATE, close, digest_of
from offsite.secagg import messages, ring
from offsite.secagg.journal import Journal
from offsite.secagg.messages import Signed
from offsite.secagg.params import SecAggParams
from offsite.trust.identity import Identity


def spend(
    update: np.ndarray, terms: SecAggParams, site: str, identity: Identity, journal: Journal, *, sealing: bytes
) -> tuple[Signed, bytes]:
    """Enters an update as sent, and returns its box with the signature over the box's SHA-256 for this round.

    As in secure aggregation the round is claimed and the update spent, durably, before anything can leave.

    Args:
      update: float32 (d,), finite and within the clip of the terms.
      terms: of the round; every site that is told another manifest has others.
      site: this site's name.
      identity: its key.
      journal: its memory.
      sealing: public key of the coordinator's for this attempt; nobody between reads the update.

    Raises:
      RangeError: the update may not be sent.
      Untrusted: the public key is none.
      ProtocolViolation: the round is not newer than the last one, or this update was sent before.
    """
    ring.check(update, clip=terms.clip, length=terms.length)
    box = close(update, terms, site, sealing)
    journal.claim(terms.federation, terms.epoch, terms.round)
    journal.spend(hashlib.sha256(np.ascontiguousarray(update).data).digest())
    return messages.sign(identity, UPDATE, terms.t0(), site, digest_of(box)), box
