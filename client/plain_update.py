"""An update that leaves a site as it is: signed, once, and only in a job that says so."""

import hashlib

import numpy as np

from protos.terms import UPDATE
from secagg import messages, ring
from secagg.journal import Journal
from secagg.messages import Signed
from secagg.terms import Terms
from trust.identity import Identity


def spend(update: np.ndarray, terms: Terms, site: str, identity: Identity, journal: Journal) -> Signed:
    """Enters an update as sent, and returns the signature of its SHA-256 for the round of these terms.

    As in secure aggregation the round is claimed and the update spent, durably, before anything can leave.

    Args:
      update: float32 (d,), finite and within the clip of the terms.
      terms: of the round; every site that is told another manifest has others.
      site: this site's name.
      identity: its key.
      journal: its memory.

    Raises:
      RangeError: the update may not be sent.
      ProtocolViolation: the round is not newer than the last one, or this update was sent before.
    """
    ring.check(update, clip=terms.clip, length=terms.length)
    journal.claim(terms.federation, terms.epoch, terms.round)
    digest = hashlib.sha256(np.ascontiguousarray(update).data).digest()
    journal.spend(digest)
    return messages.sign(identity, UPDATE, terms.t0(), site, digest)
