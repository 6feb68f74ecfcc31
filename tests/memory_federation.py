"""A federation in one process: a delivered job, and real sites with ledger, policy, audit log and signed endpoint."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from offsite.client.home.audit import Audit
from offsite.client.home.installation import SiteHome
from offsite.client.home.jobs import Jobs
from offsite.client.home.policy import Policy
from offsite.client.home.redact import for_peer
from offsite.client.home.settings import SiteSettings
from offsite.client.network.message_endpoint import SignedEndpoint
from offsite.client.service.site_runtime import SiteRuntime
from offsite.client.service.stage_handler import StageHandler
from offsite.client.site.release_log import LedgerReleaseLog
from offsite.client.site.round_handler import Site
from offsite.client.site.site_randomness import SiteRandomness
from offsite.client.training.emulator_session import EmulatorSession
from offsite.client.training.local_update import SiteJob
from offsite.client.training.privacy_plan import plan_for
from offsite.coordinator.config.federation_file import read_config
from offsite.coordinator.network.package_delivery import Delivery, deliver_all
from offsite.coordinator.rounds.exchange import MemoryExchange
from offsite.privacy.calibrate import LARGEST_DELTA
from offsite.privacy.ledger import Ledger
from offsite.protos import codec
from offsite.protos.job_manifest import JobManifest
from offsite.protos.signed_job import sign_job
from offsite.secagg.journal import FileJournal
from offsite.simulation.run_folder import Run, simulated_sessions
from offsite.trust.federation_manifest import FederationManifest, FederationMember, sign
from offsite.trust.identity import Identity
from offsite.trust.keys import SiteKeys
from offsite.trust.sealing import SealingKey

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
DATASET = "main"


@dataclass(frozen=True)
class World:
    """One job under one signed federation manifest; its tests must not write into its folders."""

    run: Run
    manifest: JobManifest
    sessions: dict[str, EmulatorSession]
    coordinator: Identity
    identities: dict[str, Identity]
    sealing: dict[str, SealingKey]
    federation: FederationManifest
    depot: Path
    deliveries: dict[str, Delivery]

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(sorted(self.identities))

    @property
    def session(self) -> EmulatorSession:
        """The session that all sites share in a job with one emulator."""
        return self.sessions[self.sites[0]]

    @property
    def delivery(self) -> Delivery:
        """The delivery to all sites in a job with one emulator."""
        return self.deliveries[self.sites[0]]

    @cached_property
    def start(self) -> np.ndarray:
        """The adapter at the start of the first round."""
        return self.session.layout.read(self.session.model)

    @cached_property
    def places(self) -> dict[str, int]:
        """The number of examples of each site, which its owner has declared."""
        return {
            site.name: len(self.run.examples(site.train, self.manifest, self.session)) for site in self.run.config.sites
        }

    @cached_property
    def signatures(self) -> dict[str, bytes]:
        return {site: sign(self.federation, identity) for site, identity in self.identities.items()}

    def offer(self, site: str, manifest: JobManifest | None = None, **changed: Any) -> codec.Offer:
        """Returns the offer of the job to a site, as the coordinator makes the offer."""
        content = (manifest or self.manifest).to_bytes()
        offer = codec.Offer(
            manifest=content,
            manifest_signature=sign_job(self.coordinator, content),
            owners=tuple(sorted(self.signatures.items())),
            package=self.deliveries[site].sha256,
            package_bytes=self.deliveries[site].size,
            sealed_key=self.deliveries[site].sealed[site],
        )
        return replace(offer, **changed)


def federation_of(identities: dict[str, Identity], coordinator: Identity, **terms: Any) -> FederationManifest:
    """Returns a federation manifest; its unused keys are stand-ins."""
    members = tuple(
        FederationMember(
            site, identity.public.hex(), terms.get("sealing", {}).get(site, "00"), f"node {site}", f"tls {site}", ""
        )
        for site, identity in sorted(identities.items())
    )
    return FederationManifest(
        name=terms.get("name", "demo"),
        epoch=1,
        previous="",
        suite=1,
        n_min=terms.get("n_min", 3),
        accomplices=len(identities) // 3,
        clip=terms.get("clip", 1e6),
        scale=32,
        max_epsilon=terms.get("max_epsilon", 8.0),
        coordinator=coordinator.public.hex(),
        members=members,
        created="2026-11-24T12:00:00Z",
        expires="2027-11-24T12:00:00Z",
    )


def make_world(fed: Path, folder: Path) -> World:
    """Builds the tiny world's emulator, its job, and the encrypted package."""
    settings, sha256 = read_config(fed)
    run = Run.create(settings, sha256, folder / "run")
    manifest = run.open_job().manifest
    names = list(manifest.sites)
    identities = {name: Identity.from_bytes((run.site_folder(name) / "identity.key").read_bytes()) for name in names}
    sealing, coordinator = {name: SealingKey.generate(1) for name in names}, Identity.generate()
    federation = federation_of(
        identities,
        coordinator,
        name=manifest.federation,
        n_min=manifest.n_min,
        max_epsilon=manifest.privacy.epsilon,
        sealing={name: key.public.hex() for name, key in sealing.items()},
    )
    deliveries = deliver_all(run.store, folder / "depot", manifest, federation)
    sessions = simulated_sessions(run, manifest)
    return World(run, manifest, sessions, coordinator, identities, sealing, federation, folder / "depot", deliveries)


def policy_for(folder: Path, **changed: Any) -> Policy:
    """Returns a policy that permits the tiny world's job."""
    path = folder / "policy.toml"
    path.write_text(Policy.template())
    permitted = replace(
        Policy.read(path),
        models=("any",),
        methods=("any",),
        splits=("any",),
        approval="automatic",
        epsilon_cap=60.0,
        allow_variants=True,
    )
    return replace(permitted, **changed)


class WorldHome(SiteHome):
    """A site's folder with the keys and the federation of a world in the place of files."""

    def __init__(self, world: World, name: str, folder: Path) -> None:
        number = world.places[name]
        super().__init__(folder, SiteSettings(name, "data.csv", dataset=DATASET, records=number, blocks=number))
        self._world = world

    @property
    def keys(self) -> SiteKeys:
        world, name = self._world, self.settings.name
        unused = self.folder / "unused.key"
        return SiteKeys(world.identities[name], world.sealing[name], unused, unused)

    def federation(self) -> FederationManifest:
        return self._world.federation

    def sign(self) -> bytes:
        return self._world.signatures[self.settings.name]


@dataclass(frozen=True, kw_only=True)
class WorldRuntime(SiteRuntime):
    """An open site with no network, no disk that fills up and no package to load; a test may put in its own steps."""

    fetch: Callable[..., Path]
    open_session: Callable[..., EmulatorSession]
    open_site: Callable[..., Site]


@dataclass
class RunningSite:
    """A site from its folder; a second object with the same folder is the site after a restart.

    Attributes:
      accountant: accountant of the ledger; `rdp` is quick.
      opened: manifests for which this site was opened.
      package: folder of a local package, in place of a fetch from the depot.
    """

    world: World
    name: str
    folder: Path
    policy: dict[str, Any] = field(default_factory=dict)
    package: Path | None = None
    fetch: Callable[..., Path] | None = None
    accountant: str = "rdp"
    opened: list[JobManifest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rules = policy_for(self.folder, **self.policy)
        self.jobs, self.audit = Jobs(self.folder / "jobs"), Audit(self.folder / "audit.jsonl")
        self.ledger = Ledger(
            self.folder / "ledger.jsonl",
            dataset=DATASET,
            epsilon_cap=self.rules.epsilon_cap,
            delta=min(self.rules.delta_cap, LARGEST_DELTA),
            accountant=self.accountant,
        )
        packages = self.folder / "packages"
        emulator = self.world.manifest.emulator_of(self.name)
        if self.package is not None and not (packages / emulator).exists():
            packages.mkdir()
            (packages / emulator).symlink_to(self.package)
        session = self.world.sessions[self.name]
        runtime = WorldRuntime(
            home=WorldHome(self.world, self.name, self.folder),
            policy=self.rules,
            audit=self.audit,
            ledger=self.ledger,
            jobs=self.jobs,
            clock=lambda: NOW,
            fetch=self.fetch or self._fetch,
            open_session=lambda manifest, package: session,
            open_site=self._open,
        )
        self.refused: list[str] = []
        self.service = StageHandler(runtime)
        self.endpoint = SignedEndpoint(
            self.name,
            self.world.identities[self.name],
            coordinator=self.world.coordinator.public,
            federation=self.world.federation.digest(),
            memory=self.folder / "letters.json",
            handle=self.service.handle,
            on_refused=self.refused.append,
        )

    def change(self, **changed: Any) -> None:
        """Changes the runtime to a test's own step, or to another clock."""
        self.service._runtime = replace(self.service._runtime, **changed)

    def ask(self, stage: str, message: codec.Message) -> codec.Message:
        """Returns the answer to a stage, without a letter around the answer; its words are constants."""
        reply = codec.decode(self.service.handle(stage, codec.encode(message)))
        assert for_peer(reply) == reply
        return reply

    @property
    def reason(self) -> str:
        """The last reason in the audit log, which its owner alone reads."""
        lines = [json.loads(line)["fields"] for line in (self.folder / "audit.jsonl").read_text().splitlines()]
        return str([line["reason"] for line in lines if "reason" in line][-1])

    def ready(self) -> None:
        """Offers the job until the site is ready."""
        for _ in range(3000):
            reply = self.ask("offer", self.world.offer(self.name))
            assert isinstance(reply, codec.OfferReply), reply
            assert reply.state in ("fetching", "ready"), reply.detail
            if reply.state == "ready":
                return
            time.sleep(0.01)
        raise AssertionError("the site did not become ready")

    def approve(self, job: JobManifest | None = None) -> None:
        """Inspects and approves a job as the owner, by default the world's."""
        digest = (job or self.world.manifest).digest().hex()
        self.jobs.show(digest, now=NOW)
        self.jobs.approve(digest, by="owner", now=NOW)

    def withdraw(self) -> None:
        """Withdraws the approval of the world's job."""
        self.jobs.withdraw(self.world.manifest.digest().hex(), by="owner", now=NOW)

    def _fetch(self, digest: str, size: int, target: Path, on_bytes: Callable[[int], None]) -> Path:
        shutil.copyfile(self.world.depot / digest, target)
        on_bytes(size)
        return target

    def _open(self, manifest: JobManifest, session: EmulatorSession) -> Site:
        self.opened.append(manifest)
        world, name = self.world, self.name
        setting = next(site for site in world.run.config.sites if site.name == name)
        examples = world.run.examples(setting.train, manifest, world.session)
        return Site(
            SiteJob(name, manifest, session, examples, plan_for(manifest, len(examples))),
            identity=world.identities[name],
            journal=FileJournal(self.folder / "journal.jsonl"),
            release_log=LedgerReleaseLog(self.ledger, manifest, audit=self.audit, clock=lambda: NOW),
            training_log=self.folder / "rounds.jsonl",
            randomness=SiteRandomness(name, 1),
        )


def open_sites(world: World, folder: Path) -> dict[str, RunningSite]:
    """Returns all sites of a world, ready for its job without a fetch."""
    sites = {name: RunningSite(world, name, folder / name, package=world.run.store.package) for name in world.sites}
    for site in sites.values():
        site.ready()
    return sites


def letters_to(sites: dict[str, RunningSite]) -> MemoryExchange:
    """Carries letters to the sites' endpoints."""
    return MemoryExchange({name: site.endpoint.answer for name, site in sites.items()})
