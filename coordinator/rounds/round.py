"""One round, top to bottom: train, sum without seeing, and hand back the mean update; or, where permitted, see each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from secrets import token_bytes

import numpy as np

from offsite.coordinator.rounds.exchange import Conversation, Exchange, Refused, Traffic
from offsite.coordinator.rounds.unmasked_round import individual_updates
from offsite.errors import ProtocolViolation, RangeError, TooFewSurvivors
from offsite.protos import codec
from offsite.protos.job_manifest import JobManifest
from offsite.protos.terms import adapter_digest, terms_of
from offsite.protos.upload import mean_of
from offsite.secagg.collector import Collector, Sum
from offsite.secagg.messages import Signed

SECRET_BYTES = 32


@dataclass(frozen=True)
class RoundPlan:
    """What one round is asked to do.

    Attributes:
      number: training round, from 1.
      sequence: secure-aggregation round, never used before in this epoch.
      nonce: 32 random bytes.
      cohort: sites that are asked.
      secret: 32 random bytes that stay here; without secure aggregation the updates are sealed to a key made of them.
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
      update: mean over those members that train an entry, float64 (upload_size,), see `JobManifest.upload_layout`.
      members: sites whose updates are in the sum.
      threshold: members needed to open it.
      refused: sites that are not, with stage and reason.
      faulty: sites whose released share did not fit those of the others; the sum was opened without it.
      traffic: bytes both ways.
      upload_bytes: bytes of one site's upload, the largest.
      payload_bytes: bytes of its plain 32-bit vector.
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
      plan: this round.
      adapter: adapter to train from, float32 (d,).
      exchange: the transport.
      on_ledger: told the newest entry of a site's privacy ledger, None where it keeps none, as soon as its upload is
        here and whatever becomes of the round.
      refresh: the emulator's biases that moved since the package was shipped, see `codec.TrainRequest`.

    Raises:
      TooFewSurvivors: fewer sites than the threshold got through; no sum exists and no update was learnt.
    """
    talk = Conversation(exchange)

    # 1 train: sites train on emulator + adapter and keep their update
    request = codec.TrainRequest(manifest.digest(), plan.number, adapter, refresh)
    ready = talk.ask("train", dict.fromkeys(plan.cohort, request), codec.TrainReply)
    talk.enough(ready, manifest.n_min, "train")

    # only those who finished are invited to what follows
    start = adapter_digest(adapter, refresh)
    opening = codec.KeysRequest(plan.number, plan.sequence, plan.nonce, start, invited=tuple(sorted(ready)))
    if manifest.aggregation.individuals:
        return _plaintext_round(manifest, opening, plan.secret, talk, on_ledger)
    return _secure_round(manifest, opening, talk, on_ledger)


def _secure_round(
    manifest: JobManifest, opening: codec.KeysRequest, talk: Conversation, on_ledger: OnLedger
) -> RoundResult:
    """Adds the updates up so that only their sum is learnt."""
    # 2 keys: the late roster
    terms = terms_of(manifest, opening)
    collector = Collector(terms)
    keys = talk.ask("keys", dict.fromkeys(opening.invited, opening), codec.SignedBatch)
    _collect(talk, "keys", keys, collector.add_keys)
    talk.enough(talk.alive(keys), terms.fewest, "keys")

    # 3 shares: every member seals shares of its two secrets to its peers
    roster = _batch(collector.roster())
    sealed = talk.ask("shares", dict.fromkeys(talk.alive(keys), roster), codec.SignedBatch)
    _collect(talk, "shares", sealed, collector.add_shares)
    talk.enough(talk.alive(sealed), terms.fewest, "shares")

    # 4 masked: the update leaves the site, hidden; from here on it is spent
    inboxes = {site: _batch(collector.inbox(site)) for site in talk.alive(sealed)}
    uploads = talk.ask("masked", inboxes, codec.MaskedReply)
    upload_bytes = max((len(codec.encode(reply)) for reply in uploads.values()), default=0)
    for site, reply in uploads.items():
        on_ledger(site, reply.ledger)
        talk.guard(site, "masked", partial(collector.add_masked, _signed(reply.commitment), reply.vector))
    talk.enough(talk.alive(uploads), terms.fewest, "masked")

    # 5 survivors: all sign one list, so that no two cohorts can be opened
    announcement = codec.Announcement(collector.announcement())
    agreed = talk.ask("survivors", dict.fromkeys(talk.alive(uploads), announcement), codec.SignedBatch)
    _collect(talk, "survivors", agreed, collector.add_survivors)
    talk.enough(talk.alive(agreed), terms.threshold, "survivors")

    # 6 unmask: one share per peer, of one kind
    signatures = _batch(collector.signatures())
    shares = talk.ask("unmask", dict.fromkeys(talk.alive(agreed), signatures), codec.SignedBatch)
    _collect(talk, "unmask", shares, collector.add_unmask)
    talk.enough(talk.alive(shares), terms.threshold, "unmask")

    total = _sum(collector)
    return RoundResult(
        update=mean_of(manifest, opening.round, total.decoded, total.members),
        members=total.members,
        threshold=terms.threshold,
        refused=tuple(talk.refused),
        faulty=collector.faulty,
        traffic=talk.traffic,
        upload_bytes=upload_bytes,
        payload_bytes=4 * manifest.upload_size(opening.round),
    )


def _plaintext_round(
    manifest: JobManifest, opening: codec.KeysRequest, secret: bytes, talk: Conversation, on_ledger: OnLedger
) -> RoundResult:
    """Takes each site's update as it is, where the job says so and every owner has permitted it."""
    found = individual_updates(manifest, opening, secret, talk)
    for site, reply in found.replies.items():
        on_ledger(site, reply.ledger)
    members = tuple(sorted(found.updates))
    talk.enough(members, manifest.n_min, "update")
    updates = np.stack([found.updates[site].astype(np.float64) for site in members])
    return RoundResult(
        update=mean_of(manifest, opening.round, updates.sum(axis=0), members),
        members=members,
        threshold=manifest.n_min,
        refused=tuple(talk.refused),
        faulty=(),
        traffic=talk.traffic,
        upload_bytes=max(len(codec.encode(reply)) for reply in found.replies.values()),
        payload_bytes=4 * manifest.upload_size(opening.round),
        individuals=updates,
    )


def tell_abort(exchange: Exchange, cohort: tuple[str, ...], reason: str) -> None:
    """Tells a cohort that its round was given up, so that nobody waits for it; answers are of no interest."""
    Conversation(exchange).ask("abort", dict.fromkeys(cohort, codec.Notice("abort", reason)), codec.Notice)


def _sum(collector: Collector) -> Sum:
    """Opens the sum; a site that cheated so that it does not open costs the attempt, not the job."""
    try:
        return collector.sum()
    except (ProtocolViolation, RangeError) as error:
        raise TooFewSurvivors(f"sum does not open: {error}") from error


def _collect(
    talk: Conversation, stage: str, answers: dict[str, codec.SignedBatch], add: Callable[[Signed], None]
) -> None:
    """Hands each site's one message to the collector; a site with none or more of them is out of the round."""
    for site, batch in answers.items():
        if len(batch.messages) != 1:
            talk.drop(site, stage, f"messages={len(batch.messages)}: a site sends one")
            continue
        talk.guard(site, stage, partial(add, _signed(batch.messages[0])))


def _signed(message: codec.SignedBytes) -> Signed:
    return Signed(message.sender, message.body, message.signature)


def _batch(messages: list[Signed]) -> codec.SignedBatch:
    return codec.SignedBatch(tuple(codec.SignedBytes(m.sender, m.body, m.signature) for m in messages))
