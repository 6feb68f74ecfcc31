"""One round, top to bottom: train, sum without seeing, hand back the mean; or, where permitted, see each update."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from secrets import token_bytes

import numpy as np

from offsite.coordinator.rounds.exchange import Conversation, Exchange, Refused, Traffic
from offsite.coordinator.rounds.unmasked_round import plaintext_updates
from offsite.errors import ProtocolViolation, RangeError, TooFewSurvivors
from offsite.protos import codec
from offsite.protos.job_manifest import JobManifest
from offsite.protos.secagg_params import adapter_digest, secagg_params
from offsite.protos.upload import mean_of
from offsite.secagg.collector import Collector, Sum
from offsite.secagg.signed_bodies import Signed

SECRET_BYTES = 32


@dataclass(frozen=True)
class RoundPlan:
    """The inputs of one round that the coordinator chooses.

    Attributes:
      number: training round, from 1.
      sequence: secure-aggregation round, never used before in this epoch.
      nonce: 32 random bytes.
      cohort: names of the sites that are asked.
      secret: 32 random bytes that stay here; without secure aggregation, updates are sealed to a key derived from them.
    """

    number: int
    sequence: int
    nonce: bytes
    cohort: tuple[str, ...]
    secret: bytes = field(default_factory=lambda: token_bytes(SECRET_BYTES), repr=False)


@dataclass(frozen=True)
class RoundResult:
    """What the coordinator knows after a round.

    Attributes:
      update: mean update, each entry over the members that train it, float64 (upload_size,); see
        `JobManifest.upload_layout`.
      members: names of the sites whose updates are in the sum.
      threshold: members needed to open the sum.
      refused: sites that left the round, with stage and reason.
      faulty: sites whose released share did not fit the others'; the sum was opened without their shares.
      traffic: bytes in both directions.
      upload_bytes: bytes of the largest upload of a site.
      payload_bytes: bytes of an upload's plain 32-bit vector.
      individuals: each member's update, float64 (n, upload_size); None under secure aggregation.
    """

    update: np.ndarray
    members: tuple[str, ...]
    threshold: int
    refused: tuple[Refused, ...]
    faulty: tuple[str, ...]
    traffic: Traffic
    upload_bytes: int
    payload_bytes: int
    individuals: np.ndarray | None = None


OnLedger = Callable[[str, codec.LedgerHead | None], None]


def run_round(
    manifest: JobManifest,
    plan: RoundPlan,
    adapter: np.ndarray,
    exchange: Exchange,
    on_ledger: OnLedger = lambda site, head: None,
    refresh: tuple[tuple[str, bytes], ...] = (),
) -> RoundResult:
    """Runs one round over an exchange.

    Args:
      manifest: the job.
      plan: plan of this round.
      adapter: adapter to train from, float32 (d,).
      exchange: exchange with the sites.
      on_ledger: called with (site, newest entry of its privacy ledger, or None without a ledger) as soon as the site's
        upload has arrived, whatever becomes of the round.
      refresh: the emulator's biases that moved since the package was built, see `codec.TrainRequest`.

    Raises:
      TooFewSurvivors: fewer sites than the threshold got through; no sum exists and no update was learnt.
    """
    talk = Conversation(exchange)

    # 1 train: sites train on emulator + adapter and keep their update
    request = codec.TrainRequest(manifest.digest(), plan.number, adapter, refresh)
    ready = talk.ask("train", dict.fromkeys(plan.cohort, request), codec.TrainReply)
    talk.enough(ready, manifest.n_min, "train")

    # only sites that finished training are invited to the rest
    start = adapter_digest(adapter, refresh)
    opening = codec.KeysRequest(plan.number, plan.sequence, plan.nonce, start, invited=tuple(sorted(ready)))
    if manifest.aggregation.secure_aggregation:
        return _secure_round(manifest, opening, talk, on_ledger)
    return _plaintext_round(manifest, opening, plan.secret, talk, on_ledger)


def _secure_round(
    manifest: JobManifest, opening: codec.KeysRequest, talk: Conversation, on_ledger: OnLedger
) -> RoundResult:
    """Adds the updates up so that the coordinator learns only their sum."""
    # 2 keys: the roster is formed only now, of sites that finished training
    terms = secagg_params(manifest, opening)
    collector = Collector(terms)
    keys = talk.ask("keys", dict.fromkeys(opening.invited, opening), codec.SignedBatch)
    _collect(talk, "keys", keys, collector.add_keys)
    talk.enough(talk.alive(keys), terms.min_sites, "keys")

    # 3 shares: every member seals shares of its two secrets to its peers
    roster = codec.SignedBatch(tuple(collector.roster()))
    sealed = talk.ask("shares", dict.fromkeys(talk.alive(keys), roster), codec.SignedBatch)
    _collect(talk, "shares", sealed, collector.add_shares)
    talk.enough(talk.alive(sealed), terms.min_sites, "shares")

    # 4 masked: the update leaves the site, hidden; from here on it is spent
    inboxes = {site: codec.SignedBatch(tuple(collector.inbox(site))) for site in talk.alive(sealed)}
    uploads = talk.ask("masked", inboxes, codec.MaskedReply)
    upload_bytes = max((len(codec.encode(reply)) for reply in uploads.values()), default=0)
    for site, reply in uploads.items():
        on_ledger(site, reply.ledger)
        talk.guard(site, "masked", partial(collector.add_masked, reply.commitment, reply.vector))
    talk.enough(talk.alive(uploads), terms.min_sites, "masked")

    # 5 survivors: all sign one list, so that no two cohorts can be opened
    announcement = codec.Announcement(collector.announcement())
    agreed = talk.ask("survivors", dict.fromkeys(talk.alive(uploads), announcement), codec.SignedBatch)
    _collect(talk, "survivors", agreed, collector.add_survivors)
    talk.enough(talk.alive(agreed), terms.threshold, "survivors")

    # 6 unmask: each site releases one share per peer, of one kind
    signatures = codec.SignedBatch(tuple(collector.signatures()))
    shares = talk.ask("unmask", dict.fromkeys(talk.alive(agreed), signatures), codec.SignedBatch)
    _collect(talk, "unmask", shares, collector.add_unmask)
    talk.enough(talk.alive(shares), terms.threshold, "unmask")

    total = _sum(collector)
    return RoundResult(
        update=mean_of(manifest, opening.round, total.decoded, total.members),
        members=total.members,
        threshold=terms.min_sites,
        refused=tuple(talk.refused),
        faulty=collector.faulty,
        traffic=talk.traffic,
        upload_bytes=upload_bytes,
        payload_bytes=4 * manifest.upload_size(opening.round),
    )


def _plaintext_round(
    manifest: JobManifest, opening: codec.KeysRequest, secret: bytes, talk: Conversation, on_ledger: OnLedger
) -> RoundResult:
    """Takes each site's update unmasked, where the job says so and every owner has permitted it."""
    received = plaintext_updates(manifest, opening, secret, talk)
    for site, reply in received.replies.items():
        on_ledger(site, reply.ledger)
    members = tuple(sorted(received.updates))
    talk.enough(members, manifest.n_min, "update")
    updates = np.stack([received.updates[site].astype(np.float64) for site in members])
    return RoundResult(
        update=mean_of(manifest, opening.round, updates.sum(axis=0), members),
        members=members,
        threshold=manifest.n_min,
        refused=tuple(talk.refused),
        faulty=(),
        traffic=talk.traffic,
        upload_bytes=max(len(codec.encode(reply)) for reply in received.replies.values()),
        payload_bytes=4 * manifest.upload_size(opening.round),
        individuals=updates,
    )


def send_abort(exchange: Exchange, cohort: tuple[str, ...], reason: str) -> None:
    """Sends a cohort the notice that its round was given up, so that no site waits for it; answers do not matter."""
    Conversation(exchange).ask("abort", dict.fromkeys(cohort, codec.Notice("abort", reason)), codec.Notice)


def _sum(collector: Collector) -> Sum:
    """Opens the sum; a site that cheats so that the sum does not open costs the attempt, not the job."""
    try:
        return collector.sum()
    except (ProtocolViolation, RangeError) as error:
        raise TooFewSurvivors(f"sum does not open: {error}") from error


def _collect(
    talk: Conversation, stage: str, answers: dict[str, codec.SignedBatch], add: Callable[[Signed], None]
) -> None:
    """Hands each site's message to the collector; a site with no message or several is out of the round."""
    for site, batch in answers.items():
        if len(batch.messages) != 1:
            talk.drop(site, stage, f"messages={len(batch.messages)}: a site sends one")
            continue
        talk.guard(site, stage, partial(add, batch.messages[0]))
