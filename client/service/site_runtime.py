"""From a site's folder to a running site: its books, its policy, its mailbox."""

import logging
import os
import secrets
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from offsite.client.home.audit import Audit
from offsite.client.home.installation import SiteHome
from offsite.client.home.jobs import Jobs
from offsite.client.home.policy import GIGABYTE, Policy, permit
from offsite.client.home.redact import local_message
from offsite.client.network.fetch import DepotAddress, fetch
from offsite.client.network.message_endpoint import SignedEndpoint
from offsite.client.network.node import NodePlace
from offsite.client.service.job_loading import Means
from offsite.client.service.stage_handler import StageHandler, Standing
from offsite.client.site.release_log import LedgerReleaseLog, ReleaseLog
from offsite.client.site.round_handler import Site
from offsite.client.training.emulator_session import EmulatorSession, encoded, open_session
from offsite.client.training.privacy_plan import plan_for
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.errors import DataError, OffsiteError, PolicyRefusal, PrivacyRefusal
from offsite.privacy.ledger import Ledger
from offsite.privacy.randomness import Randomness
from offsite.protos.job_manifest import JobManifest
from offsite.protos.messages import printable
from offsite.secagg.journal import FileJournal, Journal
from offsite.task.readers.columns import columns_for
from offsite.task.readers.tables import read
from offsite.task.records import LenientRecords
from offsite.task.spec import Record

log = logging.getLogger("offsite.client")
MAX_FAULTS = 20  # records that are told one by one in the log
ACCOUNTANT = "pld"
Clock = Callable[[], datetime]


@dataclass(frozen=True)
class SiteRuntime:
    """A site that is ready to be asked.

    Attributes:
      installation: its folder.
      policy: its owner's.
      audit: its log.
      ledger: of its data set.
      jobs: offers and approvals.
      clock: gives the time.
      told: the last reason for which each job had no data.
    """

    installation: SiteHome
    policy: Policy
    audit: Audit
    ledger: Ledger
    jobs: Jobs
    clock: Clock
    told: dict[bytes, str] = field(default_factory=dict)

    @classmethod
    def of(cls, installation: SiteHome, clock: Clock) -> "SiteRuntime":
        """Opens what a site keeps.

        Raises:
          ConfigError, DataError: policy or site.toml is wrong, or a chained file is damaged.
          PolicyRefusal: noise from a seed is asked for, and the policy does not permit it.
        """
        settings, state = installation.settings, installation.state
        policy = Policy.read(installation.policy)
        if settings.simulation_seed is not None and not policy.allow_seeded_noise:
            raise PolicyRefusal(
                f"simulation_seed={settings.simulation_seed}: noise from a seed protects nobody, and policy.toml has "
                "allow_seeded_noise=false; remove it from site.toml"
            )
        ledger = Ledger(
            state / f"ledger-{settings.dataset}.jsonl",
            dataset=settings.dataset,
            epsilon_cap=policy.epsilon_cap,
            delta=policy.delta_cap,
            accountant=ACCOUNTANT,
        )
        jobs = Jobs(state / "jobs")
        return cls(installation, policy, Audit(state / "audit.jsonl"), ledger, jobs, clock)

    def mailbox(self) -> SignedEndpoint:
        """Returns the mailbox through which the coordinator is answered."""
        installation = self.installation
        federation, keys = installation.federation(), installation.keys
        service = StageHandler(
            Standing(
                name=installation.settings.name,
                folder=installation.folder,
                dataset=installation.settings.dataset,
                federation=federation,
                signature=installation.sign(),
                coordinator=bytes.fromhex(federation.coordinator),
                policy=self.policy,
                jobs=self.jobs,
                ledger=self.ledger,
                audit=self.audit,
                means=Means(
                    installation.settings.name,
                    installation.packages,
                    keys.sealing,
                    self._fetch,
                    self.session,
                    self.site,
                    max_bytes=self.policy.max_disk_gb * GIGABYTE,
                ),
                permit=self._permit,
                clock=self.clock,
            )
        )
        return SignedEndpoint(
            installation.settings.name,
            keys.identity,
            coordinator=bytes.fromhex(federation.coordinator),
            federation=federation.digest(),
            memory=installation.state / "letters.json",
            handle=service.handle,
            on_refused=lambda reason: self.note("letter refused", reason),
        )

    def tidy(self) -> None:
        """Removes what a killed client left half unpacked; what it has fetched stays, and is gone on with."""
        for path in self.installation.packages.glob("*.plain"):
            path.unlink()
        for path in self.installation.packages.glob("*.partial"):
            if path.is_dir():
                shutil.rmtree(path)

    def node_place(self) -> NodePlace:
        """Returns where the SuperNode lives."""
        installation, welcome = self.installation, self.installation.welcome
        return NodePlace(
            folder=installation.state / "node",
            superlink=f"{welcome.host}:{welcome.link_port}",
            ca=installation.ca,
            key=installation.keys.node,
            port=installation.settings.runtime_port or _free_port(),
        )

    def note(self, kind: str, reason: str) -> None:
        """Writes a line to the audit log; one that cannot be written is told, and nothing was released by it."""
        try:
            self.audit.record(kind, now=self.clock(), reason=printable(reason))
        except DataError as error:
            log.warning("%s: %s, and %s", kind, reason, error)

    def session(self, manifest: JobManifest, package: Path) -> EmulatorSession:
        """Opens a job's emulator and writes down what the vetting measured; no record is read.

        Raises:
          OffsiteError: the emulator is not trusted, or is another one.
        """
        limits, seed = (
            VettingThresholds.for_owner(self.policy.max_rank, self.policy.max_adapter_share),
            secrets.randbits(62),
        )
        settings = self.installation.settings
        emulator = manifest.emulator_of(settings.name)
        weights = settings.weights
        session = open_session(package, manifest, emulator=emulator, limits=limits, seed=seed, weights=weights)
        self.audit.record(
            "vetted",
            now=self.clock(),
            job=manifest.digest().hex(),
            emulator=emulator,
            checks=[one.to_dict() for one in session.vetting],
        )
        return session

    def site(self, manifest: JobManifest, session: EmulatorSession) -> Site:
        """Opens this site for a job that its owner approved, with its ledger and its journal.

        Raises:
          DataError: the data cannot be read now.
          PolicyRefusal: the data do not fit. Neither says why, since a reason follows from the data.
        """
        installation = self.installation
        books = LedgerReleaseLog(self.ledger, manifest, policy=self.policy, audit=self.audit, clock=self.clock)
        journal = FileJournal(installation.state / "journal.jsonl")
        try:
            records = self.records(manifest.task)
        except Exception as error:  # where a program fails depends on what it reads
            self._tell(manifest, "data cannot be read", error)
            raise DataError("this site's data cannot be read now; its owner sees why in the site's log") from None
        try:
            return self._site(
                manifest, session, LenientRecords(records), books, journal, record=installation.state / "rounds.jsonl"
            )
        except Exception as error:
            self._tell(manifest, "data do not fit", error)
            raise PolicyRefusal("this site's data do not fit this job; its owner sees why in the site's log") from None

    def site_with(
        self, manifest: JobManifest, package: Path, books: ReleaseLog, journal: Journal, *, record: Path
    ) -> Site:
        """Opens this site with the books, the journal and the record given; a dry run brings its own."""
        session, records = self.session(manifest, package), self.records(manifest.task)
        return self._site(manifest, session, records, books, journal, record=record)

    def _tell(self, manifest: JobManifest, kind: str, error: Exception) -> None:
        """Tells the owner alone why a job's data are none, once for each reason."""
        reason = printable(str(error) if isinstance(error, OffsiteError) else local_message(error))
        if self.told.get(manifest.digest()) != reason:
            self.told[manifest.digest()] = reason
            self.note(kind, reason)
            log.warning("job %s: %s", manifest.digest().hex()[:12], reason)

    def _site(
        self,
        manifest: JobManifest,
        session: EmulatorSession,
        records: list[Record],
        books: ReleaseLog,
        journal: Journal,
        *,
        record: Path,
    ) -> Site:
        examples = encoded(session, manifest, records)
        if len(examples) < self.policy.min_records:
            raise PolicyRefusal(
                f"records={len(examples)}: policy.toml has min_records={self.policy.min_records}; add data or lower it"
            )
        plan, cap = plan_for(manifest, len(examples)), self.policy.delta_cap
        if plan.delta > cap:
            raise PrivacyRefusal(
                f"delta={plan.delta:.3g} of {len(examples)} records: policy.toml has delta_cap={cap}; "
                "add records, or raise it"
            )
        for wrong in records.faults[:MAX_FAULTS] if isinstance(records, LenientRecords) else ():
            log.warning("a record adds nothing: %s", printable(wrong))
        if empty := int((examples.targets == 0).sum()):
            log.warning("records=%d: %d have nothing to learn from, and add nothing", len(examples), empty)
        return Site(
            self.installation.settings.name,
            manifest=manifest,
            session=session,
            examples=examples,
            plan=plan,
            identity=self.installation.keys.identity,
            journal=journal,
            books=books,
            record=record,
            noise=self._noise,
            rounding=self._rounding(),
        )

    def records(self, task: str) -> list[Record]:
        """Returns this site's records with the fields that a task reads.

        Raises:
          DataError: they cannot be read.
          ConfigError: `site.toml` names a field that no task has.
        """
        settings = self.installation.settings
        columns = columns_for(task, column=settings.column, names=settings.columns)
        return read(self.installation.data, reader=settings.reader or None, columns=columns)

    def _noise(self, training: str) -> Randomness:
        settings = self.installation.settings
        if settings.simulation_seed is None:
            return Randomness.from_os()
        return Randomness.for_simulation(settings.simulation_seed, "noise", settings.name, training)

    def _rounding(self) -> Callable[[str], Callable[[int], np.ndarray]] | None:
        settings = self.installation.settings
        if (seed := settings.simulation_seed) is None:
            return None
        return lambda training: Randomness.for_simulation(seed, "rounding", settings.name, training).uniform

    def _fetch(self, digest: str, size: int, target: Path, on_bytes: Callable[[int], None]) -> Path:
        welcome, keys = self.installation.welcome, self.installation.keys
        address = DepotAddress(
            welcome.host,
            welcome.depot_port,
            ca=self.installation.ca.read_bytes(),
            cert=self.installation.certificate.read_bytes(),
            key=keys.tls.read_bytes(),
        )
        return fetch(address, digest, size, target, on_bytes=on_bytes)

    def _permit(self, manifest: JobManifest, package_bytes: int) -> None:
        permit(
            self.policy,
            manifest,
            site=self.installation.settings.name,
            now=self.clock(),
            free_disk=shutil.disk_usage(self.installation.folder).free,
            package_bytes=package_bytes,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def limit_resources(policy: Policy) -> None:
    """Keeps this process within the owner's limits: threads, address space.

    Raises:
      DataError: the operating system refuses a limit.
    """
    import resource

    import torch

    if policy.max_threads:
        torch.set_num_threads(policy.max_threads)
        os.environ["OMP_NUM_THREADS"] = str(policy.max_threads)
    if policy.max_memory_gb:
        size = int(policy.max_memory_gb * 2**30)
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (size, size))
        except (ValueError, OSError, OverflowError) as error:
            raise DataError(f"max_memory_gb={policy.max_memory_gb}: the system refuses this limit ({error})") from error
