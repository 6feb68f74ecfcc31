"""The rest of a round without secure aggregation: each site's update, sealed and signed, as every owner permitted."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from offsite.coordinator.rounds.exchange import Conversation
from offsite.errors import ProtocolViolation
from offsite.protos import codec
from offsite.protos.job_manifest import JobManifest
from offsite.protos.sealed_update import UPDATE, digest_of, key_of, unclose
from offsite.protos.terms import terms_of
from offsite.secagg import messages, ring
from offsite.secagg.messages import Signed
from offsite.secagg.params import SecAggParams
from offsite.trust.sealing import SealingKey


@dataclass(frozen=True)
class Individuals:
    """What came back.

    Attributes:
      replies: the answers, by site, also those that count for nothing.
      updates: float32 (d,) of each site whose answer is in order.
    """

    replies: Mapping[str, codec.UpdateReply]
    updates: Mapping[str, np.ndarray]


def individual_updates(
    manifest: JobManifest, opening: codec.KeysRequest, secret: bytes, talk: Conversation
) -> Individuals:
    """Asks each site for its update; what is wrong in one costs its site the round, and nobody else.

    Args:
      manifest: the job.
      opening: the round and who is in it.
      secret: 32 bytes of this attempt, of which the key is made that opens the answers.
      talk: to the sites.

    Raises:
      ConfigError: fewer sites than n_min.
    """
    terms, key = terms_of(manifest, opening), key_of(secret)
    request = codec.UpdateRequest(opening, key.public)
    replies = talk.ask(UPDATE, dict.fromkeys(opening.invited, request), codec.UpdateReply)
    updates: dict[str, np.ndarray] = {}
    for site, reply in replies.items():
        talk.guard(site, UPDATE, partial(_take, updates, terms, site, reply, key))
    return Individuals(replies, updates)


def _take(
    updates: dict[str, np.ndarray], terms: SecAggParams, site: str, reply: codec.UpdateReply, key: SealingKey
) -> None:
    """Keeps an update that is this site's, for this round, and one that it may send.

    Raises:
      ProtocolViolation: another sender, another box than was signed, or signed for another round.
      Untrusted: it does not open.
      RangeError: wrong length, not finite, or out of the job's bound.
    """
    signed, public = reply.commitment, terms.public_key(site)
    if signed.sender != site or public is None:
        raise ProtocolViolation(f"sender={signed.sender!r}: site {site!r} was asked; drop the update")
    messages.check(public, UPDATE, terms.t0(), Signed(signed.sender, signed.body, signed.signature))
    if digest_of(reply.box) != signed.body:
        raise ProtocolViolation(f"sender={site!r} signed the hash of another update; drop the update")
    update = unclose(reply.box, terms, site, key)
    ring.check(update, clip=terms.clip, length=terms.length)
    updates[site] = update
