"""One round, top to bottom: train, sum without seeing, and hand back the mean update."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import numpy as np

from coordinator.exchange import Conversation, Exchange, Refused, Traffic
from errors import OffsiteError, ProtocolViolation, RangeError, TooFewSurvivors
from protos import codec
from protos.manifest import JobManifest
from protos.terms import adapter_digest, terms_of
from secagg.collector import Collector, Sum
from secagg.messages import Signed


@dataclass(frozen=True)
class RoundPlan:
    """What one round is asked to do.

    Attributes:
      number: training round, from 1.
      sequence: secure-aggregation round, never used before in this epoch.
      nonce: 32 random bytes.
      cohort: sites that are asked.
    """

    number: int
    sequence: int
    nonce: bytes
    cohort: tuple[str, ...]


@dataclass(frozen=True)
class RoundResult:
    """What the coordinator knows after a round.

    Attributes:
      update: mean over the members, float64 (d,).
      members: sites whose updates are in the sum.
      threshold: members needed to open it.
      refused: sites that are not, with stage and reason.
      faulty: sites whose released share did not fit those of the others; the sum was opened without it.
      traffic: bytes both ways.
      upload_bytes: bytes of one site's masked upload, the largest.
      payload_bytes: bytes of its plain 32-bit vector.
    """

    update: np.ndarray
    members: tuple[str, ...]
    threshold: int
    refused: tuple[Refused, ...]
    faulty: tuple[str, ...]
    traffic: Traffic
    upload_bytes: int
    payload_bytes: int


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
    _enough(ready, manifest.n_min, talk, "train")

    # 2 keys: late roster, only those who finished are invited
    start = adapter_digest(adapter, refresh)
    opening = codec.KeysRequest(plan.number, plan.sequence, plan.nonce, start, invited=tuple(sorted(ready)))
    terms = terms_of(manifest, opening)
    collector = Collector(terms)
    keys = talk.ask("keys", dict.fromkeys(ready, opening), codec.SignedBatch)
    _collect(talk, "keys", keys, collector.add_keys)
    _enough(_alive(keys, talk), terms.fewest, talk, "keys")

    # 3 shares: every member seals shares of its two secrets to its peers
    roster = _batch(collector.roster())
    sealed = talk.ask("shares", dict.fromkeys(_alive(keys, talk), roster), codec.SignedBatch)
    _collect(talk, "shares", sealed, collector.add_shares)
    _enough(_alive(sealed, talk), terms.fewest, talk, "shares")

    # 4 masked: the update leaves the site, hidden; from here on it is spent
    inboxes = {site: _batch(collector.inbox(site)) for site in _alive(sealed, talk)}
    uploads = talk.ask("masked", inboxes, codec.MaskedReply)
    upload_bytes = max((len(codec.encode(reply)) for reply in uploads.values()), default=0)
    for site, reply in uploads.items():
        on_ledger(site, reply.ledger)
        _guard(talk, site, "masked", partial(collector.add_masked, _signed(reply.commitment), reply.vector))
    _enough(_alive(uploads, talk), terms.fewest, talk, "masked")

    # 5 survivors: all sign one list, so that no two cohorts can be opened
    announcement = codec.Announcement(collector.announcement())
    agreed = talk.ask("survivors", dict.fromkeys(_alive(uploads, talk), announcement), codec.SignedBatch)
    _collect(talk, "survivors", agreed, collector.add_survivors)
    _enough(_alive(agreed, talk), terms.threshold, talk, "survivors")

    # 6 unmask: one share per peer, of one kind
    signatures = _batch(collector.signatures())
    shares = talk.ask("unmask", dict.fromkeys(_alive(agreed, talk), signatures), codec.SignedBatch)
    _collect(talk, "unmask", shares, collector.add_unmask)
    _enough(_alive(shares, talk), terms.threshold, talk, "unmask")

    total = _sum(collector)
    return RoundResult(
        update=total.decoded / len(total.members),
        members=total.members,
        threshold=terms.threshold,
        refused=tuple(talk.refused),
        faulty=collector.faulty,
        traffic=talk.traffic,
        upload_bytes=upload_bytes,
        payload_bytes=4 * manifest.layout.size,
    )


def tell_abort(exchange: Exchange, cohort: tuple[str, ...], reason: str) -> None:
    """Tells a cohort that its round was given up, so that nobody waits for it; answers are of no interest."""
    Conversation(exchange).ask("abort", dict.fromkeys(cohort, codec.Notice("abort", reason)), codec.Notice)


def _enough(alive: Collection[str], needed: int, talk: Conversation, stage: str) -> None:
    if len(alive) < needed:
        first = f"; first refusal: {talk.refused[0].site}: {talk.refused[0].reason}" if talk.refused else ""
        raise TooFewSurvivors(f"sites={len(alive)} after {stage}: {needed} are needed to open a sum{first}")


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
        _guard(talk, site, stage, partial(add, _signed(batch.messages[0])))


def _guard(talk: Conversation, site: str, stage: str, action: Callable[[], None]) -> None:
    """Runs one collector step; a bad message costs its site the round, not the others."""
    try:
        action()
    except OffsiteError as error:
        talk.drop(site, stage, str(error))


def _alive(answers: dict[str, codec.SignedBatch] | dict[str, codec.MaskedReply], talk: Conversation) -> list[str]:
    gone = {refused.site for refused in talk.refused}
    return [site for site in answers if site not in gone]


def _signed(message: codec.SignedBytes) -> Signed:
    return Signed(message.sender, message.body, message.signature)


def _batch(messages: list[Signed]) -> codec.SignedBatch:
    return codec.SignedBatch(tuple(codec.SignedBytes(m.sender, m.body, m.signature) for m in messages))
