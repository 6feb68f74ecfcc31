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
from offsite.protos.secagg_params import secagg_params
from offsite.secagg import ring, signed_bodies
from offsite.secagg.params import SecAggParams
from offsite.trust.sealing import SealingKey


@dataclass(frozen=True)
class PlaintextUpdates:
    """The answers to an update request.

    Attributes:
      replies: all answers by site, also invalid answers.
      updates: update by site, float32 (d,), for the sites whose answer is valid.
    """

    replies: Mapping[str, codec.UpdateReply]
    updates: Mapping[str, np.ndarray]


def plaintext_updates(
    manifest: JobManifest, opening: codec.KeysRequest, secret: bytes, talk: Conversation
) -> PlaintextUpdates:
    """Asks each site for its update; an invalid answer costs its site the round, and no other.

    Args:
      manifest: the job.
      opening: opening of the round, with its sites.
      secret: 32 bytes of this attempt, from which the key to the answers is derived.
      talk: conversation with the sites.

    Raises:
      ConfigError: fewer sites than n_min are in the opening.
    """
    terms, key = secagg_params(manifest, opening), key_of(secret)
    request = codec.UpdateRequest(opening, key.public)
    replies = talk.ask(UPDATE, dict.fromkeys(opening.invited, request), codec.UpdateReply)
    updates: dict[str, np.ndarray] = {}
    for site, reply in replies.items():
        talk.guard(site, UPDATE, partial(_take, updates, terms, site, reply, key))
    return PlaintextUpdates(replies, updates)


def _take(
    updates: dict[str, np.ndarray], terms: SecAggParams, site: str, reply: codec.UpdateReply, key: SealingKey
) -> None:
    """Keeps an update if it is this site's, for this round, and within the job's bound.

    Raises:
      ProtocolViolation: the answer has another sender, another box than was signed, or a signature for another round.
      Untrusted: the box does not open.
      RangeError: the update has the wrong length, or a value that is not finite or out of the job's bound.
    """
    signed, public = reply.commitment, terms.public_key(site)
    if signed.sender != site or public is None:
        raise ProtocolViolation(f"sender={signed.sender!r}: site {site!r} was asked; drop the update")
    signed_bodies.check(public, UPDATE, terms.t0(), signed)
    if digest_of(reply.box) != signed.body:
        raise ProtocolViolation(f"sender={site!r} signed the hash of another update; drop the update")
    update = unclose(reply.box, terms, site, key)
    ring.check(update, clip=terms.clip, length=terms.length)
    updates[site] = update
