"""What a site does with each stage of its coordinator: look at offers, take part in rounds, write down what leaves."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from offsite.client.home.audit import Audit
from offsite.client.home.jobs import Jobs
from offsite.client.home.policy import Policy, permit_now
from offsite.client.home.redact import local_message, peer_message
from offsite.client.service.job_loading import FETCHING, OPENING, READY, REFUSED, VETTED, JobLoader, Means
from offsite.client.service.job_queue import LatestJobRunner
from offsite.client.site.release_log import ledger_name
from offsite.client.site.round_handler import answer
from offsite.errors import OffsiteError, PolicyRefusal, PrivacyRefusal, ProtocolViolation, Untrusted, lookup
from offsite.privacy.accountants import ACCOUNTANTS
from offsite.privacy.ledger import Ledger
from offsite.protos import codec
from offsite.protos.job_manifest import JobManifest
from offsite.protos.messages import printable
from offsite.protos.signed_job import check_job
from offsite.trust.countersign import check_countersigned
from offsite.trust.federation_manifest import FederationManifest, check_signatures

log = logging.getLogger("offsite.client")
WAITING = "waiting"
_RESENT = ("keys", "shares", "masked", "survivors", "unmask", "update")  # the same question gets the same bytes again


@dataclass(frozen=True)
class Standing:
    """What this site has agreed to, and what it keeps.

    Attributes:
      name: this site.
      folder: the site's, which nobody else is told.
      dataset: name of its data set, as in the ledger.
      federation: the manifest that its owner signed.
      signature: that signature, 64 bytes.
      coordinator: the coordinator's Ed25519 key.
      policy: the owner's.
      jobs: offers and approvals.
      ledger: of the data set.
      audit: the site's log.
      means: to prepare a job.
      permit: (manifest, bytes of the package) checks the owner's policy.
      clock: gives the time.
    """

    name: str
    folder: Path
    dataset: str
    federation: FederationManifest
    signature: bytes
    coordinator: bytes
    policy: Policy
    jobs: Jobs
    ledger: Ledger
    audit: Audit
    means: Means
    permit: Callable[[JobManifest, int], None]
    clock: Callable[[], datetime]


class StageHandler:
    """One running site.

    Args:
      standing: what it has agreed to.
    """

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        self._preparation: JobLoader | None = None
        self._workshop = LatestJobRunner()
        self._sent: dict[str, tuple[bytes, bytes]] = {}
        self._ready = ""  # the job whose being ready was written down
        self._said: dict[str, str] = {}  # the last line of each stage, for the people at this machine

    def handle(self, stage: str, body: bytes) -> bytes:
        """Returns the answer to a stage; a refusal is an answer, and is written down."""
        try:
            reply = self._dispatch(stage, body)
        except OffsiteError as error:
            reply = codec.encode(codec.Refusal(type(error).__name__, str(error)))
        except Exception as error:  # a fault of ours must not leave the coordinator waiting
            reply = codec.encode(codec.Refusal("Fault", peer_message(error)))
            log.error("stage %s: %s: %s", printable(stage), type(error).__name__, local_message(error))
        message = codec.decode(reply)
        if isinstance(message, codec.Refusal | codec.OfferReply):
            message = self._outward(message)
            reply = codec.encode(message)
        fields = {"stage": stage, "answer": type(message).__name__, "bytes": len(reply)}
        if isinstance(message, codec.Refusal):
            fields |= {"error": message.kind, "reason": message.reason}
        if stage != "offer" or isinstance(message, codec.Refusal):
            self._note("answered", fields)
        self._say(stage, status_line(stage, message))
        return reply

    def _outward(self, message: codec.Refusal | codec.OfferReply) -> codec.Refusal | codec.OfferReply:
        """Returns an answer without the places of this machine."""
        folder = str(self._standing.folder)
        if isinstance(message, codec.Refusal):
            return dataclasses.replace(message, reason=message.reason.replace(folder, "SITE"))
        return dataclasses.replace(message, detail=message.detail.replace(folder, "SITE"))

    def _say(self, stage: str, line: str) -> None:
        """Says a line to the people at this machine, unless it was the last one of this stage in this round."""
        if stage == "train":
            self._said = {name: peer_message for name, peer_message in self._said.items() if name in ("offer", "train")}
        if line and line != self._said.get(stage):
            log.info("%s", line)
            self._said[stage] = line
        if stage == "finish":
            self._said.clear()

    def _dispatch(self, stage: str, body: bytes) -> bytes:
        if stage in ("offer", "finish"):
            message = codec.decode(body)
            if isinstance(message, codec.Offer):
                return codec.encode(self._offer(message))
            if isinstance(message, codec.Notice):
                return codec.encode(self._finish(message))
            raise ProtocolViolation(f"stage={stage!r}: {type(message).__name__} does not belong there")
        return self._round(stage, body)

    def _round(self, stage: str, body: bytes) -> bytes:
        preparation = self._preparation
        if stage == "train" and preparation is not None and not self._approved(preparation.manifest):
            raise PolicyRefusal(f"job={preparation.manifest.digest().hex()[:12]}: its owner has not approved it")
        if preparation is None or preparation.site is None:
            raise ProtocolViolation(f"stage={stage!r}: no job is ready at this site; offer it first")
        asked = hashlib.sha256(body).digest()
        if stage in _RESENT and self._sent.get(stage, (b"", b""))[0] == asked:
            return self._sent[stage][1]
        if stage == "train":
            permit_now(self._standing.policy, self._standing.clock())
            self._sent.clear()
        reply = answer(preparation.site, stage, body)
        if stage in _RESENT and not isinstance(codec.decode(reply), codec.Refusal):
            self._sent[stage] = (asked, reply)
        return reply

    def _offer(self, offer: codec.Offer) -> codec.OfferReply:
        standing = self._standing
        standing.federation.check_valid(standing.clock())  # a site may run for longer than its owners signed
        manifest = check_job(standing.coordinator, offer.manifest, offer.manifest_signature)
        if missing := sorted(
            {member.site for member in standing.federation.members} - {site for site, _ in offer.owners}
        ):
            return self._reply(WAITING, f"signatures of {', '.join(missing)} under the federation manifest are missing")
        check_signatures(standing.federation, dict(offer.owners))
        _check_terms(manifest, standing.federation)
        self._check_ledger(offer)
        digest = manifest.digest().hex()
        if digest not in standing.jobs.names():
            standing.jobs.keep(offer.manifest, offer.manifest_signature, digest)
            self._note("offered", {"job": digest, "model": manifest.model, "epsilon": manifest.privacy.epsilon})
        standing.permit(manifest, offer.package_bytes)
        return self._prepare(offer, manifest)

    def _approved(self, manifest: JobManifest) -> bool:
        """Says whether a job may train now; an approval that its owner took back does not count any more."""
        standing = self._standing
        return standing.policy.approval == "automatic" or manifest.digest().hex() in standing.jobs.approved()

    def _prepare(self, offer: codec.Offer, manifest: JobManifest) -> codec.OfferReply:
        """Returns how far a job is: fetched and vetted unapproved, so that its owner can try it, and no further."""
        preparation = self._preparation
        if preparation is None or preparation.manifest != manifest or _is_stale(preparation, offer):
            self._note("accepted", {"job": manifest.digest().hex()})
            preparation = JobLoader(offer, manifest, self._standing.means, lambda: self._approved(manifest))
            self._preparation = preparation
            self._workshop.take(preparation)
            self._sent.clear()
        preparation.wait(0.2)
        approved, state = self._approved(manifest), preparation.state
        if state == REFUSED and (approved or not preparation.opened):
            return self._reply(REFUSED, preparation.detail)
        if not approved:
            waits = f"the data owner has not approved job {manifest.digest().hex()[:12]} yet"
            return self._reply(WAITING, waits, preparation.fetched)
        if state == READY:
            self._note_once_ready(manifest)
            return self._reply(READY, "", preparation.fetched)
        reads = state in (VETTED, OPENING)
        return self._reply(FETCHING, "approved, its data are read" if reads else "", preparation.fetched)

    def _note_once_ready(self, manifest: JobManifest) -> None:
        job = manifest.digest().hex()
        if self._ready != job:
            self._ready = job
            self._note("ready", {"job": job})

    def _check_ledger(self, offer: codec.Offer) -> None:
        standing = self._standing
        mine = ledger_name(standing.dataset)
        for head in offer.ledgers:
            if head.ledger == mine:
                check_countersigned(
                    standing.coordinator, standing.name, head.ledger, head.count, head.head, head.signature
                )
                standing.ledger.check_against(head.count, head.head)

    def _finish(self, notice: codec.Notice) -> codec.Notice:
        self._workshop.clear()
        self._preparation = None
        self._sent.clear()
        self._note("finished", {"reason": notice.reason})
        return notice

    def _reply(self, state: str, detail: str, fetched: int = 0) -> codec.OfferReply:
        count, head = self._standing.ledger.head()
        own = codec.LedgerHead(ledger_name(self._standing.dataset), count, head)
        return codec.OfferReply(state, detail, fetched, self._standing.signature, own)

    def _note(self, kind: str, fields: Mapping[str, object]) -> None:
        self._standing.audit.record(kind, now=self._standing.clock(), **fields)


def status_line(stage: str, reply: codec.Message) -> str:
    """Returns what people at a site are told of one answer; empty where nothing has changed for them.

    Args:
      stage: that was answered.
      reply: the answer.
    """
    line = ""
    match reply:
        case codec.Refusal(kind=kind, reason=reason) if stage == "offer":
            line = f"job refused: {kind}: {reason}; after a change here, start offsite client run again"
        case codec.Refusal(kind=kind, reason=reason):
            line = f"refused in stage {stage}: {kind}: {reason}"
        case codec.OfferReply(state="fetching", detail=detail):
            line = f"job {detail or 'offered: its package is fetched and vetted'}"
        case codec.OfferReply(state=state, detail=detail):
            line = f"job {state}: {detail}" if detail else f"job {state}"
        case codec.MaskedReply():
            line = "a masked update has left; the audit log tells its size and what privacy it cost"
        case codec.UpdateReply():
            line = "an update has left AS IT IS, for the coordinator to see; the audit log tells what privacy it cost"
        case codec.TrainReply(round=number):
            line = f"round {number}: trained"
        case codec.Notice(kind="abort", reason=reason):
            line = f"the coordinator gave the round up: {reason!r}"
        case codec.Notice(reason=reason):
            line = f"job ended: {reason!r}"
    return line


def _is_stale(preparation: JobLoader, offer: codec.Offer) -> bool:
    """Says whether a refusal was about another package; the coordinator makes one anew when its own is damaged."""
    return preparation.state == REFUSED and preparation.package != offer.package


def _check_terms(manifest: JobManifest, federation: FederationManifest) -> None:
    """Checks that a job keeps to what every owner signed.

    Raises:
      Untrusted: another federation, epoch or roster.
      PolicyRefusal: weaker terms than were signed.
      PrivacyRefusal: no privacy.
      UnknownName: this release has no such accountant.
    """
    lookup(ACCOUNTANTS, manifest.privacy.accountant, "job accountant")
    roster = tuple((member.site, member.identity) for member in federation.members)
    found = (manifest.federation, manifest.epoch, manifest.roster)
    if found != (federation.name, federation.epoch, roster):
        raise Untrusted(
            f"job federation={manifest.federation!r} epoch={manifest.epoch}: the owners signed {federation.name!r} "
            f"epoch {federation.epoch} with {len(roster)} sites; make the job again under that manifest"
        )
    if not manifest.privacy.private:
        raise PrivacyRefusal("job private=false: a real site trains with differential privacy only; switch it on")
    for name, value, worst in (
        ("epsilon", manifest.privacy.epsilon, federation.max_epsilon),
        ("update_bound", manifest.update_bound, federation.clip),
        ("n_min", -manifest.n_min, -federation.n_min),
    ):
        if not value <= worst:
            raise PolicyRefusal(f"job {name}={abs(value)}: the owners signed {abs(worst)}; keep to it")
    ours = version("offsite")
    if manifest.release.split(".")[:2] != ours.split(".")[:2]:
        raise PolicyRefusal(
            f"job release={manifest.release!r}: this site runs offsite {ours}; install the same release"
        )
