"""An update that leaves a site unmasked: sealed to the coordinator and signed, once, and only in a job that says so."""

import hashlib

import numpy as np

from offsite.protos.sealed_update import UPDATE, close, digest_of
from offsite.secagg import ring, signed_bodies
from offsite.secagg.journal import Journal
from offsite.secagg.params import SecAggParams
from offsite.secagg.signed_bodies import Signed
from offsite.trust.identity import Identity


def spend(
    update: np.ndarray, terms: SecAggParams, site: str, identity: Identity, journal: Journal, *, sealing: bytes
) -> tuple[Signed, bytes]:
    """Enters an update as sent, and returns the signature over its box's SHA-256 for this round, and the box.

    As in secure aggregation, the round is claimed and the update spent, durably, before anything can leave.

    Args:
      update: update, float32 (d,), finite and within the clip of the terms.
      terms: parameters of the round; they differ between sites that got different manifests.
      site: name of this site.
      identity: signing key of this site.
      journal: journal of this site.
      sealing: public key of the coordinator for this attempt; nobody in between can read the update.

    Raises:
      RangeError: the update is not finite, or exceeds the clip.
      Untrusted: the public key is not a valid key.
      ProtocolViolation: the round is not newer than the last one, or this update was sent before.
    """
    ring.check(update, clip=terms.clip, length=terms.length)
    box = close(update, terms, site, sealing)
    journal.claim(terms.federation, terms.epoch, terms.round)
    journal.spend(hashlib.sha256(np.ascontiguousarray(update).data).digest())
    return signed_bodies.sign(identity, UPDATE, terms.t0(), site, digest_of(box)), box
