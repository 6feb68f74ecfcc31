"""A coordinator in a test's hands: the real keys, link, depot and job, and all letters that the test wants to send."""

import contextlib
import hashlib
import io
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from offsite.client.home.redact import for_peer
from offsite.coordinator.config.federation_file import read_config
from offsite.coordinator.home.ledger_heads import Ledgers
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.coordinator.home.status import Status
from offsite.coordinator.job.store import Store
from offsite.coordinator.network.flower_exchange import GridExchange
from offsite.coordinator.network.package_delivery import Delivery, deliver
from offsite.coordinator.network.readiness import ReadinessPolicy
from offsite.coordinator.network.signed_exchange import SignedExchange
from offsite.coordinator.network.superlink_session import SuperLinkSession
from offsite.coordinator.rounds.counter import MonotonicCounter
from offsite.coordinator.rounds.round import RoundPlan
from offsite.coordinator.service import JobContext, Offers, _depot, _readiness_poller, link_place, open_job
from offsite.protos import codec, signed_messages
from offsite.protos.flower_pieces import OTHER_BYTES
from offsite.protos.job_manifest import JobManifest
from offsite.protos.signed_job import package_context, sign_job
from offsite.trust import streaming
from offsite.trust.identity import Identity
from offsite.trust.sealing import seal
from tests.faults.conftest import Federation

ANSWER_SECONDS = 90.0


def now() -> datetime:
    return datetime.now(UTC)


class HostileCoordinator:
    """A coordinator that cheats, as a context manager while the sites of a federation run.

    Args:
      federation: federation of this coordinator.
      path: federation file of the job.
    """

    def __init__(self, federation: Federation, path: Path) -> None:
        config, _ = read_config(path)
        self.federation, self.home = federation, CoordinatorHome.open(federation.home)
        self.epoch = self.home.federation()
        folder = federation.folder / f"hostile-{path.stem}"
        self.setting = JobContext(
            home=self.home,
            config=config,
            store=Store(folder),
            status=Status(self.home.folder / "status.json", now),
            nonce=lambda: secrets.token_bytes(32),
            now=now,
            on_step=lambda text: None,
            on_round=lambda line: None,
        )
        self.job = open_job(self.setting, self.epoch)
        self.delivery = self.deliver(self.setting.store.package, self.job.manifest)
        self.numbers = MonotonicCounter(self.home.folder / "letters.txt")
        self.aggregations = MonotonicCounter(self.home.folder / "aggregations.txt")
        self.ledgers = Ledgers(self.home.folder / "ledgers.json", self.home.identity)
        self.bad: list[str] = []  # why an answer was not opened
        self.answers_from: dict[str, Path] = {}  # folders of copies that answer in the place of their sites
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "HostileCoordinator":
        self._open.enter_context(_depot(self.home, now))
        nodes = {member.site: member.node for member in self.epoch.members}
        self.link = self._open.enter_context(SuperLinkSession(link_place(self.home), nodes, largest=OTHER_BYTES))
        self.exchange = GridExchange(self.link.grid, nodes=self.link.node_ids, deadline=ANSWER_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def manifest(self) -> JobManifest:
        return self.job.manifest

    # the acts of an honest coordinator

    def ready(self, patience: float = 90.0) -> tuple[str, ...]:
        """Offers the job until every site is ready."""
        offers = Offers(self.correspondence(), self.ledgers, {})
        deliveries = {member.site: self.delivery for member in self.epoch.members}
        poller = _readiness_poller(self.setting, self.job, self.epoch, deliveries, offers)
        everyone = len(self.epoch.members)
        return poller.wait(ReadinessPolicy(everyone, everyone, patience))

    def correspondence(self) -> SignedExchange:
        return SignedExchange(
            self.exchange, self.home.identity, self.epoch, self.numbers, lambda site, why: self.bad.append(why)
        )

    def plan(self, number: int = 1, cohort: tuple[str, ...] | None = None) -> RoundPlan:
        sites = tuple(member.site for member in self.epoch.members)
        return RoundPlan(number, self.aggregations.next(), secrets.token_bytes(32), cohort or sites)

    def start(self) -> np.ndarray:
        return self.job.start

    # the acts of a hostile coordinator

    def letter(
        self,
        site: str,
        stage: str,
        message: codec.Message | bytes,
        *,
        identity: Identity | None = None,
        recipient: str | None = None,
        sender: str = signed_messages.COORDINATOR,
        number: int | None = None,
        federation: bytes | None = None,
    ) -> bytes:
        return signed_messages.write(
            identity or self.home.identity,
            federation or self.epoch.digest(),
            sender=sender,
            recipient=recipient or site,
            stage=stage,
            number=number or self.numbers.next(),
            body=message if isinstance(message, bytes) else codec.encode(message),
        )

    def send(self, site: str, stage: str, data: bytes) -> codec.Message:
        """Sends the bytes of a letter and returns the content of the site's own letter, whose words are constants."""
        replies = self.exchange.send(stage, {site: data})
        assert site in replies, f"{site} did not answer"
        reply = codec.decode(codec.decode_signed_message(replies[site]).body)
        assert for_peer(reply) == reply
        return reply

    def reason(self, site: str) -> str:
        """Returns the last reason in the audit log of a site, whose folder `answers_from` names where it is a copy."""
        folder = self.answers_from.get(site, self.federation.site(site))
        lines = (folder / "state" / "audit.jsonl").read_text().splitlines()
        return str([fields["reason"] for line in lines if "reason" in (fields := json.loads(line)["fields"])][-1])

    def ask(self, site: str, stage: str, message: codec.Message | bytes, **changed: Any) -> codec.Message:
        return self.send(site, stage, self.letter(site, stage, message, **changed))

    def refused(self, site: str, stage: str, message: codec.Message | bytes, **changed: Any) -> str:
        """Sends a message and returns the reason of the refusal, which the site's owner alone reads."""
        reply = self.ask(site, stage, message, **changed)
        assert isinstance(reply, codec.Refusal), reply
        return self.reason(site)

    def offer(
        self, site: str, manifest: JobManifest | bytes, delivery: Delivery | None = None, **changed: Any
    ) -> codec.Offer:
        content = manifest if isinstance(manifest, bytes) else manifest.to_bytes()
        chosen = delivery or self.delivery
        offer = codec.Offer(
            manifest=content,
            manifest_signature=sign_job(self.home.identity, content),
            owners=tuple(sorted(self.home.signatures().items())),
            package=chosen.sha256,
            package_bytes=chosen.size,
            sealed_key=chosen.sealed[site],
            ledgers=self.ledgers.countersigned(site),
        )
        return replace(offer, **changed)

    def offered(self, site: str, offer: codec.Offer, seconds: float = 600.0) -> codec.OfferReply:
        """Offers a job until the site has decided."""
        until = time.monotonic() + seconds
        while True:
            reply = self.ask(site, "offer", offer)
            assert isinstance(reply, codec.OfferReply), reply
            if reply.state != "fetching" or time.monotonic() > until:
                return reply
            time.sleep(0.2)

    def deliver(self, package: Path, manifest: JobManifest) -> Delivery:
        facts = self.setting.store.folder / f"delivery-{manifest.digest().hex()[:12]}.json"
        sites = [member.site for member in self.epoch.members]
        return deliver(package, self.home.folder / "depot", manifest, self.epoch, facts, sites=sites)

    def deliver_stream(self, stream: bytes, manifest: JobManifest) -> Delivery:
        """Puts any bytes into the depot as the package of a job."""
        key, sealed = secrets.token_bytes(32), io.BytesIO()
        streaming.encrypt(io.BytesIO(stream), sealed, key)
        digest = hashlib.sha256(sealed.getvalue()).digest()
        (self.home.folder / "depot" / digest.hex()).write_bytes(sealed.getvalue())
        context = package_context(manifest, digest)
        boxes = {
            member.site: seal(self.epoch.suite, bytes.fromhex(member.sealing), key, context)
            for member in self.epoch.members
        }
        return Delivery(digest, len(sealed.getvalue()), boxes)

    def job_like(self, **changed: Any) -> JobManifest:
        """Another job with some facts changed."""
        return replace(self.manifest, identifier=secrets.token_hex(32), **changed)


class Tampered:
    """An exchange in which one stage is changed on its way out or on its way back.

    Args:
      inner: exchange that carries all stages.
      stage: name of the changed stage.
      outgoing: function from payloads to changed payloads.
      incoming: function from replies to changed replies.
    """

    def __init__(
        self,
        inner: Any,
        stage: str,
        *,
        outgoing: Callable[[dict[str, bytes]], Mapping[str, bytes]] = dict,
        incoming: Callable[[dict[str, bytes]], dict[str, bytes]] = dict,
    ) -> None:
        self.inner, self.stage, self.outgoing, self.incoming = inner, stage, outgoing, incoming
        self.seen: dict[str, dict[str, bytes]] = {}
        self.asked: dict[str, dict[str, bytes]] = {}

    def send(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        chosen = dict(self.outgoing(dict(payloads))) if stage == self.stage else dict(payloads)
        self.asked[stage] = chosen
        replies = self.inner.send(stage, chosen)
        self.seen[stage] = replies
        return self.incoming(dict(replies)) if stage == self.stage else replies


def stream_of(manifest: dict[str, Any] | bytes, files: Mapping[str, bytes]) -> tuple[bytes, str]:
    """Returns a package stream with any manifest and files, and the digest that its job must name."""
    content = (
        manifest
        if isinstance(manifest, bytes)
        else json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=True).encode() + b"\n"
    )
    body = b"".join(files[name] for name in sorted(files))
    return len(content).to_bytes(8, "big") + content + body, hashlib.sha256(content).hexdigest()
