"""A site's answer to each stage of its coordinator: look at offers, take part in rounds, write down every answer."""

import hashlib
import logging
from collections.abc import Mapping
from importlib.metadata import version

from offsite.client.home.policy import permit_now, permit_terms
from offsite.client.home.redact import (
    FAULT,
    NOT_APPROVED,
    NOT_SIGNED,
    READS_DATA,
    REFUSED,
    for_peer,
    local_message,
)
from offsite.client.network.message_endpoint import SignedEndpoint
from offsite.client.service.job_loading import FETCHING, OPENING, READY, VETTED, JobLoader
from offsite.client.service.job_queue import LatestJobRunner
from offsite.client.service.site_runtime import SiteRuntime
from offsite.client.site.release_log import ledger_name
from offsite.client.site.round_handler import answer
from offsite.errors import OffsiteError, PolicyRefusal, PrivacyRefusal, ProtocolViolation, Untrusted, lookup
from offsite.privacy.accountants import ACCOUNTANTS
from offsite.protos import codec
from offsite.protos.flower_pieces import OTHER_BYTES, VALUE_BYTES
from offsite.protos.job_manifest import JobManifest
from offsite.protos.messages import MAX_REFRESH_BYTES, printable
from offsite.protos.signed_job import check_job
from offsite.trust.countersign import check_countersigned
from offsite.trust.federation_manifest import FederationManifest, check_signatures

log = logging.getLogger("offsite.client")
WAITING = "waiting"
_LOOK = "beside this run, look with offsite client inspect, and agree with offsite client approve"
SHARE_BYTES = 512  # of a sealed share with its recipient's name
_RESENT = ("keys", "shares", "masked", "survivors", "unmask", "update")  # the same question gets the same bytes again


class StageHandler:
    """One running site.

    Args:
      runtime: open site, whose owner has accepted a federation.

    Raises:
      DataError, Untrusted: the site has not joined, or has left.
    """

    def __init__(self, runtime: SiteRuntime) -> None:
        self._runtime, self._signature = runtime, runtime.home.sign()
        self._loader: JobLoader | None = None
        self._runner = LatestJobRunner()
        self._sent: dict[str, tuple[bytes, bytes]] = {}
        self._noted: dict[str, tuple[str, str]] = {}  # last job and reason in the audit log, by kind of entry
        self._offered: Mapping[str, object] = {}  # last answer to an offer
        self._shown: dict[str, str] = {}  # last line of each stage for the people at this machine

    def endpoint(self) -> SignedEndpoint:
        """Returns the endpoint at which this site answers its coordinator's letters."""
        runtime = self._runtime
        return SignedEndpoint(
            runtime.name,
            runtime.home.keys.identity,
            coordinator=runtime.coordinator,
            federation=runtime.federation.digest(),
            memory=runtime.home.state / "letters.json",
            handle=self.handle,
            on_refused=lambda reason: runtime.note("letter refused", reason),
        )

    def largest(self) -> int:
        """Returns the bytes of the longest honest message now: an adapter and a refresh only of a job that is ready."""
        members, loader = len(self._runtime.federation.members), self._loader
        size = OTHER_BYTES + SHARE_BYTES * members**2  # each member seals a share to each of the others
        if loader is None or loader.site is None:
            return size
        return size + VALUE_BYTES * loader.manifest.layout.size + MAX_REFRESH_BYTES

    def handle(self, stage: str, body: bytes) -> bytes:
        """Returns the answer to a stage, and writes it to the audit log; a refusal is an answer."""
        try:
            reply = self._dispatch(stage, body)
        except OffsiteError as error:
            reply = codec.encode(codec.Refusal(type(error).__name__, str(error)))
        except Exception as error:  # a bug must not leave the coordinator waiting
            reply = codec.encode(codec.Refusal(FAULT, local_message(error)))
            log.error("stage %s: %s: %s", printable(stage), type(error).__name__, local_message(error))
        message = codec.decode(reply)
        told = for_peer(message)
        reply = reply if told is message else codec.encode(told)
        fields = {"stage": stage, "answer": type(message).__name__, "bytes": len(reply)}
        if isinstance(message, codec.Refusal):
            fields |= {"error": message.kind, "reason": message.reason}
        if stage != "offer" or (isinstance(message, codec.Refusal) and fields != self._offered):
            self._note("answered", fields)
        if stage == "offer":
            self._offered = fields  # the coordinator asks again and again
        self._show(stage, status_line(stage, message))
        return reply

    def _show(self, stage: str, line: str) -> None:
        """Shows a line to the people at this machine, unless the last line of this stage in this round was the same."""
        if stage == "train":
            self._shown = {name: last for name, last in self._shown.items() if name in ("offer", "signatures", "train")}
        if line and line != self._shown.get(stage):
            log.info("%s", line)
            self._shown[stage] = line
        if stage == "finish":
            self._shown.clear()

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
        loader = self._loader
        if stage == "train" and loader is not None and not self._runtime.is_approved(loader.manifest):
            raise PolicyRefusal(f"job={loader.manifest.digest().hex()[:12]}: the data owner has not approved this job")
        if loader is None or loader.site is None:
            raise ProtocolViolation(f"stage={stage!r}: no job is ready at this site; offer a job first")
        asked = hashlib.sha256(body).digest()
        if stage in _RESENT and self._sent.get(stage, (b"", b""))[0] == asked:
            return self._sent[stage][1]
        if stage == "train":
            permit_now(self._runtime.policy, self._runtime.clock())
            self._sent.clear()
        reply = answer(loader.site, stage, body)
        if stage in _RESENT and not isinstance(codec.decode(reply), codec.Refusal):
            self._sent[stage] = (asked, reply)
        return reply

    def _offer(self, offer: codec.Offer) -> codec.OfferReply:
        runtime, federation = self._runtime, self._runtime.federation
        federation.check_valid(runtime.clock())  # a site may run for longer than its owners signed
        manifest = check_job(runtime.coordinator, offer.manifest, offer.manifest_signature)
        if missing := sorted({member.site for member in federation.members} - dict(offer.owners).keys()):
            self._show("signatures", f"job waits for the signatures of {', '.join(missing)}")
            return self._reply(WAITING, NOT_SIGNED)
        check_signatures(federation, dict(offer.owners))
        _check_terms(manifest, federation)
        self._check_ledger(offer)
        permit_terms(runtime.policy, manifest, site=runtime.name)  # the hours come later: an owner looks at any time
        digest = manifest.digest().hex()
        if digest not in runtime.jobs.names():
            runtime.jobs.keep(offer.manifest, offer.manifest_signature, digest)
            self._note("offered", {"job": digest, "model": manifest.model, "epsilon": manifest.privacy.epsilon})
        runtime.jobs.keep_package(digest, offer.package, offer.package_bytes)
        runtime.check_policy(manifest, offer.package, offer.package_bytes)
        runtime.close_others(manifest)
        return self._load(offer, manifest)

    def _load(self, offer: codec.Offer, manifest: JobManifest) -> codec.OfferReply:
        """Returns how far a job is; without an approval a job is fetched and vetted, so that its owner can try it."""
        loader = self._loader
        if loader is None or loader.manifest != manifest or _is_stale(loader, offer):
            self._note("accepted", {"job": manifest.digest().hex()})
            if loader is not None:
                loader.stop()
            loader = self._loader = JobLoader(offer, manifest, self._runtime)
            self._runner.take(loader)
            self._sent.clear()
        loader.wait(0.2)
        approved, state = self._runtime.is_approved(manifest), loader.state
        if state == REFUSED and (approved or not loader.opened):
            self._note_once("refused", manifest, loader.detail)
            return self._reply(REFUSED, loader.detail)
        if not approved:
            return self._reply(WAITING, NOT_APPROVED, loader.fetched)
        if state == READY:
            self._runtime.reserve(manifest)  # once more changes nothing; a reserve may have been closed meanwhile
            self._note_once("ready", manifest)
            return self._reply(READY, "", loader.fetched)
        reads = state in (VETTED, OPENING)
        return self._reply(FETCHING, READS_DATA if reads else "", loader.fetched)

    def _note_once(self, kind: str, manifest: JobManifest, reason: str = "") -> None:
        """Writes a state of a job to the audit log when it begins; the coordinator asks again and again."""
        job = manifest.digest().hex()
        if self._noted.get(kind) != (job, reason):
            self._noted[kind] = job, reason
            self._note(kind, {"job": job} | ({"reason": printable(reason)} if reason else {}))

    def _check_ledger(self, offer: codec.Offer) -> None:
        """Checks the ledger against the heads that the coordinator has countersigned for this site.

        Raises:
          PrivacyRefusal: the ledger is an old copy.
          Untrusted: the coordinator did not sign a head.
        """
        runtime = self._runtime
        own = ledger_name(runtime.ledger.dataset)
        for head in offer.ledgers:
            if head.ledger == own:
                check_countersigned(
                    runtime.coordinator, runtime.name, head.ledger, head.count, head.head, head.signature
                )
                runtime.ledger.check_against(head.count, head.head)

    def _finish(self, notice: codec.Notice) -> codec.Notice:
        self._runner.clear()
        if self._loader is not None:  # what the job did not spend returns to the data set
            self._loader.stop()
            self._runtime.ledger.close(self._loader.manifest.digest().hex(), now=self._runtime.clock())
        self._loader = None
        self._sent.clear()
        self._note("finished", {"reason": notice.reason})
        return notice

    def _reply(self, state: str, detail: str, fetched: int = 0) -> codec.OfferReply:
        ledger = self._runtime.ledger
        head = codec.LedgerHead(ledger_name(ledger.dataset), *ledger.head())
        return codec.OfferReply(state, detail, fetched, self._signature, head)

    def _note(self, kind: str, fields: Mapping[str, object]) -> None:
        self._runtime.audit.record(kind, now=self._runtime.clock(), **fields)


def status_line(stage: str, reply: codec.Message) -> str:
    """Returns the line about one answer for the people at a site; empty where nothing has changed for them.

    Args:
      stage: stage that the coordinator asked for.
      reply: answer of the site.
    """
    line = ""
    match reply:
        case codec.Refusal(kind=kind, reason=reason) if stage == "offer":
            line = f"job refused: {kind}: {reason}; after a change here, start offsite client run again"
        case codec.Refusal(kind=kind, reason=reason):
            line = f"refused in stage {stage}: {kind}: {reason}"
        case codec.OfferReply():
            line = _offer_line(reply)
        case codec.MaskedReply():
            line = "a masked update has left; the audit log has its size and the privacy that it cost"
        case codec.UpdateReply():
            line = "an update has left UNMASKED: the coordinator sees it; the audit log has the privacy that it cost"
        case codec.TrainReply(round=number):
            line = f"round {number}: trained"
        case codec.Notice(kind="abort", reason=reason):
            line = f"the coordinator gave the round up: {reason!r}"
        case codec.Notice(reason=reason):
            line = f"job ended: {reason!r}"
    return line


def _offer_line(reply: codec.OfferReply) -> str:
    if reply.state == FETCHING:
        return f"job {reply.detail or 'offered: its package is fetched and vetted'}"
    line = f"job {reply.state}: {reply.detail}" if reply.detail else f"job {reply.state}"
    return f"{line}; {_LOOK}" if reply.detail == NOT_APPROVED else line


def _is_stale(loader: JobLoader, offer: codec.Offer) -> bool:
    """Says whether a refusal was about another package; a coordinator whose package was damaged makes a new package."""
    return loader.state == REFUSED and loader.package != offer.package


def _check_terms(manifest: JobManifest, federation: FederationManifest) -> None:
    """Checks that a job keeps to the terms that every owner signed.

    Raises:
      Untrusted: the job names another federation, epoch or roster.
      PolicyRefusal: the job has weaker terms than the owners signed.
      PrivacyRefusal: the job has no privacy.
      UnknownName: this release has no such accountant.
    """
    lookup(ACCOUNTANTS, manifest.privacy.accountant, "job accountant")
    roster = tuple((member.site, member.identity) for member in federation.members)
    named = (manifest.federation, manifest.epoch, manifest.roster)
    if named != (federation.name, federation.epoch, roster):
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
        ("accomplices", -manifest.accomplices, -federation.accomplices),
    ):
        if not value <= worst:
            raise PolicyRefusal(f"job {name}={abs(value)}: the owners signed {abs(worst)}; keep to it")
    ours = version("offsite")
    if manifest.release.split(".")[:2] != ours.split(".")[:2]:
        raise PolicyRefusal(
            f"job release={manifest.release!r}: this site runs offsite {ours}; install the same release"
        )
