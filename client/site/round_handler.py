"""A site's side of a round: one handler for each stage, bytes in, bytes out."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offsite.client.site.release_log import Release, ReleaseLog
from offsite.client.training.emulator_session import EmulatorSession
from offsite.client.training.local_update import Trained, local_update
from offsite.client.training.privacy_plan import SitePlan, round_terms
from offsite.client.training.training_log import append, to_json
from offsite.client.training.unmasked_update import spend
from offsite.emulator.runtime.refresh_state import size_of
from offsite.errors import DigestMismatch, MalformedMessage, OffsiteError, ProtocolViolation, RangeError, lookup
from offsite.privacy.events import Event
from offsite.privacy.randomness import Randomness
from offsite.protos import codec
from offsite.protos.job_manifest import JobManifest
from offsite.protos.terms import adapter_digest, terms_of
from offsite.protos.upload import check_coverage
from offsite.secagg.journal import Journal
from offsite.secagg.member import Member
from offsite.secagg.messages import Signed, read_announcement
from offsite.secagg.params import SecAggParams
from offsite.task.spec import Batch
from offsite.trust.identity import Identity

log = logging.getLogger("offsite.client")


class Site:
    """The installation of one data owner, for one job.

    Args:
      name: this site's name in the roster.
      manifest: the job that the data owner accepted.
      bench: opened emulator; sites of one simulation share it.
      examples: this site's records; they never leave this object.
      plan: this site's DP numbers.
      identity: long-term signing key.
      journal: secure-aggregation rounds that were used up, on disk.
      books: account of what leaves.
      record: file to which this site writes what it did; it stays here.
      noise: gives the randomness of a training's sampling and noise by the training's name; of the operating system
        except in a simulation.
      rounding: gives the randomness of its stochastic rounding, or None for the operating system's.
    """

    def __init__(
        self,
        name: str,
        *,
        manifest: JobManifest,
        session: EmulatorSession,
        examples: Batch,
        plan: SitePlan,
        identity: Identity,
        journal: Journal,
        books: ReleaseLog,
        record: Path,
        noise: Callable[[str], Randomness],
        rounding: Callable[[str], Callable[[int], np.ndarray]] | None = None,
    ) -> None:
        self.name = name
        self.plan = plan
        self._manifest, self._session, self._examples = manifest, session, examples
        self._identity, self._journal, self._record = identity, journal, record
        self._books = books
        self._noise, self._rounding = noise, rounding
        self._pending: _Pending | None = None
        self._member: Member | None = None
        self._last = 0  # the newest round that was trained
        self._left = 0  # how often an update of that round has left

    def train(self, request: codec.TrainRequest) -> codec.Message:
        """Trains, and holds the update until secure aggregation asks for it."""
        if request.job != self._manifest.digest():
            raise DigestMismatch(
                f"job={request.job.hex()[:12]}: not the job this site accepted; send its manifest first"
            )
        if not 1 <= request.round <= self._manifest.rounds:
            raise ProtocolViolation(
                f"round={request.round}: the job has rounds 1..{self._manifest.rounds}; noise was planned for no more"
            )
        if request.refresh and not 0 < self._manifest.refresh < request.round:
            raise ProtocolViolation(
                f"round={request.round} refresh tensors={len(request.refresh)}: the job says "
                f"refresh={self._manifest.refresh}, so the emulator's biases do not move before this round; refuse it"
            )
        if request.round < self._last:
            raise ProtocolViolation(f"round={request.round}: round {self._last} was trained already; rounds only go up")
        adapter = adapter_digest(request.adapter, request.refresh)
        if self._pending is not None and self._pending.of == (request.round, adapter):
            return codec.TrainReply(request.round)  # asked again after a crash over there; nothing of it has left
        self._left = self._left if request.round == self._last else 0
        event = self._event()
        self._books.check(event)
        self._session.refresh(request.refresh)
        trained = local_update(
            self._session,
            request.adapter.astype(np.float32),
            self._examples,
            manifest=self._manifest,
            plan=self.plan,
            randomness=self._noise(self._training(request.round)),
            site=self.name,
            number=request.round,
        )
        append(self._record, self._line(request.round, trained) | {"refresh_bytes": size_of(request.refresh)})
        if dropped := trained.outcome.dropped:
            log.warning("round %d: %d drawn records added nothing: the model fails on them", request.round, dropped)
        self._last = request.round
        self._pending = _Pending((request.round, adapter), trained.update, event)
        self._member = None  # one that was opened for an earlier update holds that one
        return codec.TrainReply(request.round)

    def rehearse(self) -> dict[str, Any]:
        """Trains the first round from the adapter's start and keeps nothing of it; returns what happened."""
        start = self._session.layout.read(self._session.model)
        self._session.refresh(())
        trained = local_update(
            self._session,
            start,
            self._examples,
            manifest=self._manifest,
            plan=self.plan,
            randomness=self._noise("rehearsal"),
            site=self.name,
            number=1,
        )
        self._session.put(start)
        return self._line(1, trained)

    def keys(self, request: codec.KeysRequest) -> codec.Message:
        """Opens secure aggregation of the pending update with fresh keys."""
        if self._manifest.aggregation.individuals:
            raise ProtocolViolation("stage=keys: this job has no secure aggregation; ask for the update as it says")
        pending, terms = self._awaited(request)
        check_coverage(self._manifest, request.invited)
        self._member = Member(terms, self.name, self._identity, self._journal, minimum=self._manifest.n_min)
        rounding = self._rounding(self._training(request.round)) if self._rounding else None
        try:
            return _wrap(self._member.keys(pending.update, rounding=rounding))
        except RangeError:
            self._pending = self._member = None  # it can never be sent; the next try trains anew
            raise

    def update(self, request: codec.UpdateRequest) -> codec.Message:
        """Sends the pending update as it is, sealed to the coordinator, once; only in a job that says so."""
        if not self._manifest.aggregation.individuals:
            raise ProtocolViolation("stage=update: in this job an update leaves masked, or not at all; open its keys")
        pending, terms = self._awaited(request.opening)
        self._pending = None  # whatever happens now, it is not sent a second time
        commitment, box = spend(
            pending.update, terms, self.name, self._identity, self._journal, sealing=request.sealing
        )
        self._left += 1
        head = self._books.release(Release(pending.of[0], pending.event, pending.update, pending.update.nbytes))
        return codec.UpdateReply(bytes_of(commitment), box, head)

    def _awaited(self, request: codec.KeysRequest) -> tuple["_Pending", SecAggParams]:
        """Returns the update that a round asks for, and the terms of that round."""
        if self._pending is None or self._pending.of != (request.round, request.adapter):
            raise ProtocolViolation(
                f"round={request.round}: no update of this round is waiting; ask for training first"
            )
        return self._pending, terms_of(self._manifest, request)

    def shares(self, batch: codec.SignedBatch) -> codec.Message:
        """Seals shares of this site's two secrets to its peers."""
        return _wrap(self._active().shares(signed(batch)))

    def masked(self, batch: codec.SignedBatch) -> codec.Message:
        """Uploads the masked update; the update is spent by that."""
        member, pending = self._active(), self._pending
        if pending is None:
            raise ProtocolViolation("no update is waiting at this site; it is sent once; ask for training first")
        check_coverage(self._manifest, {self.name, *(message.sender for message in batch.messages)})
        commitment, vector = member.masked(signed(batch))
        self._pending = None  # the journal has it as spent, whatever happens now
        self._left += 1
        head = self._books.release(Release(pending.of[0], pending.event, pending.update, vector.nbytes))
        return codec.MaskedReply(bytes_of(commitment), vector, head)

    def survivors(self, announcement: codec.Announcement) -> codec.Message:
        """Signs one survivor set, never a second, and none over which a part of the sum would be that of too few."""
        member = self._active()
        if self._manifest.aggregation.ranks:
            check_coverage(self._manifest, read_announcement(announcement.body)[1])
        return _wrap(member.survivors(announcement.body))

    def unmask(self, batch: codec.SignedBatch) -> codec.Message:
        """Answers with one share per peer, then forgets the round."""
        member, self._member = self._active(), None
        return _wrap(member.unmask(signed(batch)))

    def abort(self, notice: codec.Notice) -> codec.Message:
        """Forgets an open aggregation; an update that has not left stays, for a round with fresh masks."""
        self._member = None
        return notice

    def _training(self, number: int) -> str:
        """Names a training; a round that is trained again after its update left must draw other noise."""
        return str(number) if self._left == 0 else f"{number}.{self._left}"

    def _event(self) -> Event | None:
        terms = round_terms(self._manifest, self.plan, self._session.engine or "bookkeeping")
        return terms.event() if terms.private else None

    def _active(self) -> Member:
        if self._member is None:
            raise ProtocolViolation("no secure aggregation is open at this site; start with the keys stage")
        return self._member

    def _line(self, number: int, trained: Trained) -> dict[str, Any]:
        return to_json(trained, number=number, site=self.name, steps=self._manifest.local_steps)


@dataclass(frozen=True)
class _Pending:
    """A trained update that has not left: (round, digest of what it started from), update, what it spends."""

    of: tuple[int, bytes]
    update: np.ndarray
    event: Event | None


_Handler = Callable[[Site, codec.Message], codec.Message]


def _typed(kind: type, method: Callable[..., codec.Message]) -> _Handler:
    def handle(site: Site, message: codec.Message) -> codec.Message:
        if not isinstance(message, kind):
            raise MalformedMessage(f"message={type(message).__name__}: this stage takes {kind.__name__}")
        return method(site, message)

    return handle


STAGES: dict[str, _Handler] = {
    "train": _typed(codec.TrainRequest, Site.train),
    "keys": _typed(codec.KeysRequest, Site.keys),
    "update": _typed(codec.UpdateRequest, Site.update),
    "shares": _typed(codec.SignedBatch, Site.shares),
    "masked": _typed(codec.SignedBatch, Site.masked),
    "survivors": _typed(codec.Announcement, Site.survivors),
    "unmask": _typed(codec.SignedBatch, Site.unmask),
    "abort": _typed(codec.Notice, Site.abort),
}


def answer(site: Site, stage: str, body: bytes) -> bytes:
    """Returns a site's answer to one stage; a refusal travels as a message with its reason, anything else is a bug."""
    try:
        return codec.encode(lookup(STAGES, stage, "stage")(site, codec.decode(body)))
    except OffsiteError as error:
        return codec.encode(codec.Refusal(type(error).__name__, str(error)))


def signed(batch: codec.SignedBatch) -> list[Signed]:
    """Returns the messages of a batch as secure aggregation knows them."""
    return [Signed(m.sender, m.body, m.signature) for m in batch.messages]


def bytes_of(message: Signed) -> codec.SignedBytes:
    """Returns a secure-aggregation message as it travels."""
    return codec.SignedBytes(message.sender, message.body, message.signature)


def _wrap(message: Signed) -> codec.SignedBatch:
    return codec.SignedBatch((bytes_of(message),))
