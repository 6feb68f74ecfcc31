"""The rest of a round without secure aggregation: each site's update, signed, as every owner permitted."""

import hashlib
from functools import partial

import numpy as np

from coordinator.exchange import Conversation
from errors import ProtocolViolation
from protos import codec
from protos.manifest import JobManifest
from protos.terms import UPDATE, terms_of
from secagg import messages, ring
from secagg.messages import Signed
from secagg.terms import Terms


def individual_updates(
    manifest: JobManifest, opening: codec.KeysRequest, talk: Conversation
) -> dict[str, codec.UpdateReply]:
    """Asks each site for its update and returns the answers, by site; what is wrong in one costs its site the round.

    Raises:
      ConfigError: fewer sites than n_min.
    """
    terms = terms_of(manifest, opening)
    replies = talk.ask("update", dict.fromkeys(opening.invited, opening), codec.UpdateReply)
    for site, reply in replies.items():
        talk.guard(site, "update", partial(_check, terms, site, reply))
    return replies


def _check(terms: Terms, site: str, reply: codec.UpdateReply) -> None:
    """Checks that an update is this site's, for this round, and one that it may send.

    Raises:
      ProtocolViolation: another sender, another vector than was signed, or signed for another round.
      RangeError: wrong length, not finite, or out of the job's bound.
    """
    signed, public = reply.commitment, terms.public_key(site)
    if signed.sender != site or public is None:
        raise ProtocolViolation(f"sender={signed.sender!r}: site {site!r} was asked; drop the update")
    messages.check(public, UPDATE, terms.t0(), Signed(signed.sender, signed.body, signed.signature))
    if hashlib.sha256(np.ascontiguousarray(reply.vector).data).digest() != signed.body:
        raise ProtocolViolation(f"sender={site!r} signed the hash of another update; drop the update")
    ring.check(reply.vector, clip=terms.clip, length=terms.length)
