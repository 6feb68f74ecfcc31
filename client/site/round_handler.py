"""A site's side of a round: one handler for each stage, from bytes to bytes."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offsite.client.site.release_log import Release, ReleaseLog
from offsite.client.site.site_randomness import SiteRandomness
from offsite.client.training.local_update import SiteJob, Trained, local_update
from offsite.client.training.privacy_plan import round_terms
from offsite.client.training.training_log import append, to_json
from offsite.client.training.unmasked_update import spend
from offsite.emulator.runtime.refresh_state import size_of
from offsite.errors import DigestMismatch, MalformedMessage, OffsiteError, ProtocolViolation, RangeError, lookup
from offsite.privacy.events import Event
from offsite.protos import codec
from offsite.protos.secagg_params import adapter_digest, secagg_params
from offsite.protos.upload import check_coverage
from offsite.secagg.journal import Journal
from offsite.secagg.member import Member
from offsite.secagg.params import SecAggParams
from offsite.secagg.signed_bodies import read_announcement
from offsite.trust.identity import Identity

log = logging.getLogger("offsite.client")


class Site:
    """The installation of one data owner, for one job.

    Args:
      job: job as this site trains it, with the site's records.
      identity: long-term signing key of the site.
      journal: used-up rounds of secure aggregation, on disk.
      release_log: account of all updates that leave.
      training_log: file to which this site writes its own diagnostics; the file stays at the site.
      randomness: randomness of sampling, noise and rounding.
    """

    def __init__(
        self,
        job: SiteJob,
        *,
        identity: Identity,
        journal: Journal,
        release_log: ReleaseLog,
        training_log: Path,
        randomness: SiteRandomness,
    ) -> None:
        self.name, self.plan = job.site, job.plan
        self._job, self._manifest, self._session = job, job.manifest, job.session
        self._identity, self._journal = identity, journal
        self._release_log, self._training_log, self._randomness = release_log, training_log, randomness
        self._pending: _Pending | None = None
        self._member: Member | None = None
        self._last = 0  # number of the newest round that was trained
        self._left = 0  # number of updates of that round that have left

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
            return codec.TrainReply(request.round)  # the coordinator crashed and asks again; the update is still here
        self._left = self._left if request.round == self._last else 0
        event = self._event()
        self._release_log.check(event)
        self._session.refresh(request.refresh)
        noise = self._randomness.noise(self._training(request.round))
        trained = local_update(self._job, request.adapter.astype(np.float32), randomness=noise, number=request.round)
        append(self._training_log, self._line(request.round, trained) | {"refresh_bytes": size_of(request.refresh)})
        if dropped := trained.outcome.dropped:
            log.warning("round %d: the model fails on %d drawn records, which added nothing", request.round, dropped)
        self._last = request.round
        self._pending = _Pending((request.round, adapter), trained.update, event)
        self._member = None  # a member opened before holds an earlier update
        return codec.TrainReply(request.round)

    def rehearse(self) -> dict[str, Any]:
        """Trains the first round from the adapter's start, keeps no result, and returns the site's diagnostics."""
        start = self._session.layout.read(self._session.model)
        self._session.refresh(())
        trained = local_update(self._job, start, randomness=self._randomness.noise("rehearsal"))
        self._session.put(start)
        return self._line(1, trained)

    def keys(self, request: codec.KeysRequest) -> codec.Message:
        """Opens secure aggregation of the pending update with fresh keys."""
        if self._manifest.aggregation.individuals:
            raise ProtocolViolation("stage=keys: this job has no secure aggregation; ask for the update as it says")
        pending, terms = self._awaited(request)
        check_coverage(self._manifest, request.invited)
        self._member = Member(terms, self.name, self._identity, self._journal, minimum=self._manifest.n_min)
        rounding = self._randomness.rounding(self._training(request.round))
        try:
            return codec.SignedBatch((self._member.keys(pending.update, rounding=rounding),))
        except RangeError:
            self._pending = self._member = None  # this update can never be sent; the next try trains anew
            raise

    def update(self, request: codec.UpdateRequest) -> codec.Message:
        """Sends the pending update unmasked, sealed to the coordinator, once; only in a job that says so."""
        if not self._manifest.aggregation.individuals:
            raise ProtocolViolation("stage=update: in this job an update leaves masked, or not at all; open its keys")
        pending, terms = self._awaited(request.opening)
        self._pending = None  # whatever happens now, the update is not sent a second time
        commitment, box = spend(
            pending.update, terms, self.name, self._identity, self._journal, sealing=request.sealing
        )
        self._left += 1
        head = self._release_log.release(Release(pending.of[0], pending.event, pending.update, pending.update.nbytes))
        return codec.UpdateReply(commitment, box, head)

    def _awaited(self, request: codec.KeysRequest) -> tuple["_Pending", SecAggParams]:
        """Returns the update that a round asks for, and the parameters of its secure aggregation."""
        if self._pending is None or self._pending.of != (request.round, request.adapter):
            raise ProtocolViolation(
                f"round={request.round}: no update of this round is waiting; ask for training first"
            )
        return self._pending, secagg_params(self._manifest, request)

    def shares(self, batch: codec.SignedBatch) -> codec.Message:
        """Seals shares of this site's two secrets to its peers."""
        return codec.SignedBatch((self._active().shares(batch.messages),))

    def masked(self, batch: codec.SignedBatch) -> codec.Message:
        """Uploads the masked update, which is then spent."""
        member, pending = self._active(), self._pending
        if pending is None:
            raise ProtocolViolation("no update is waiting at this site; an update is sent once; ask for training first")
        check_coverage(self._manifest, {self.name, *(message.sender for message in batch.messages)})
        commitment, vector = member.masked(batch.messages)
        self._pending = None  # the journal has entered the update as spent, whatever happens now
        self._left += 1
        head = self._release_log.release(Release(pending.of[0], pending.event, pending.update, vector.nbytes))
        return codec.MaskedReply(commitment, vector, head)

    def survivors(self, announcement: codec.Announcement) -> codec.Message:
        """Signs one survivor set and never a second; refuses a set in which too few sites train a part of the sum."""
        member = self._active()
        if self._manifest.aggregation.ranks:
            check_coverage(self._manifest, read_announcement(announcement.body)[1])
        return codec.SignedBatch((member.survivors(announcement.body),))

    def unmask(self, batch: codec.SignedBatch) -> codec.Message:
        """Answers with one share per peer, then forgets the round."""
        member, self._member = self._active(), None
        return codec.SignedBatch((member.unmask(batch.messages),))

    def abort(self, notice: codec.Notice) -> codec.Message:
        """Forgets an open aggregation; an update that has not left waits for a round with fresh masks."""
        self._member = None
        return notice

    def _training(self, number: int) -> str:
        """Returns the name of a training; a round that is trained again after its update left draws other noise."""
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
    """A trained update that has not left.

    Attributes:
      of: round, and digest of the adapter from which the training started.
      update: update, float32 (d,).
      event: spending of the release; None without privacy.
    """

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
    """Returns a site's answer to one stage; a refusal is a message with its reason, and any other error is a bug."""
    try:
        return codec.encode(lookup(STAGES, stage, "stage")(site, codec.decode(body)))
    except OffsiteError as error:
        return codec.encode(codec.Refusal(type(error).__name__, str(error)))
