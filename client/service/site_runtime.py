"""From a site's folder to an open site: its accounts, its owner's policy, and how it opens a job."""

import logging
import secrets
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path

from offsite.client.home.audit import Audit
from offsite.client.home.declared_records import BLOCKS, check_count, places, read_records, read_records_for_job
from offsite.client.home.installation import SiteHome
from offsite.client.home.jobs import Jobs
from offsite.client.home.package_room import PackageRoom, size_of
from offsite.client.home.policy import Policy, permit
from offsite.client.home.redact import local_message
from offsite.client.network.fetch import DepotAddress, fetch
from offsite.client.network.node import SuperNodeConfig
from offsite.client.service.approval import reserve, site_plan
from offsite.client.site.release_log import CountingReleaseLog, LedgerReleaseLog, ReleaseLog
from offsite.client.site.round_handler import Site
from offsite.client.site.site_randomness import SiteRandomness
from offsite.client.training.emulator_session import EmulatorSession, encode_records, open_session
from offsite.client.training.estimate import estimate
from offsite.client.training.example_places import in_places
from offsite.client.training.local_update import SiteJob
from offsite.client.training.privacy_plan import SitePlan
from offsite.client.training.workers import Workers
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.errors import DataError, OffsiteError, PolicyRefusal
from offsite.privacy.ledger import Ledger
from offsite.protos.job_manifest import JobManifest
from offsite.protos.messages import printable
from offsite.protos.proxies import check_way
from offsite.secagg.journal import FileJournal, Journal, MemoryJournal
from offsite.task.device import choose_devices
from offsite.task.device_memory import check_fits
from offsite.task.nothing_to_learn import Encoder, counted, learnt
from offsite.task.number_format import dtype_of, name_of
from offsite.task.records import LenientRecords, place_of
from offsite.task.spec import Record
from offsite.trust.addresses import with_port
from offsite.trust.federation_manifest import FederationManifest

log = logging.getLogger("offsite.client")
_SMALLER = "free memory, name another device in site.toml, or ask the coordinator for a smaller emulator"
MAX_FAULTS = 20  # records with an error that the log names one by one
Clock = Callable[[], datetime]


@dataclass(frozen=True)
class SiteRuntime:
    """An open site: its folder, the policy of its owner, and the files in which it keeps account.

    Attributes:
      home: folder with keys, settings and the accepted federation.
      policy: permissions and limits of the owner.
      audit: log of everything that the owner may want to check.
      ledger: privacy spending of the data set.
      jobs: offered jobs and approvals.
      clock: source of the time.
    """

    home: SiteHome
    policy: Policy
    audit: Audit
    ledger: Ledger
    jobs: Jobs
    clock: Clock
    _reasons: dict[bytes, str] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, home: SiteHome, clock: Clock) -> "SiteRuntime":
        """Opens a site's policy and accounts.

        Raises:
          ConfigError, DataError: `policy.toml` or `site.toml` is wrong, or a chained file is damaged.
          PolicyRefusal: `site.toml` asks for noise from a seed, and the policy does not permit it.
        """
        policy, state = home.read_policy(), home.state
        return cls(home, policy, home.audit, home.ledger(policy), Jobs(state / "jobs"), clock)

    @property
    def name(self) -> str:
        """The site's name in the federation."""
        return self.home.settings.name

    @cached_property
    def federation(self) -> FederationManifest:
        """The manifest that the owner accepted, read once: one process serves one epoch."""
        return self.home.federation()

    @property
    def coordinator(self) -> bytes:
        """The coordinator's Ed25519 public key."""
        return bytes.fromhex(self.federation.coordinator)

    def tidy(self) -> None:
        """Removes half unpacked packages of a killed client; a half fetched package stays, and its fetch resumes."""
        for path in self.home.packages.glob("*.plain"):
            path.unlink()
        for path in self.home.packages.glob("*.partial"):
            if path.is_dir():
                shutil.rmtree(path)

    def supernode(self) -> SuperNodeConfig:
        """Returns the configuration of this site's SuperNode.

        Raises:
          ConfigError: the proxy of `site.toml` cannot lead to the coordinator's address.
        """
        welcome = self.home.welcome
        check_way(welcome.host, self.home.settings.proxy)
        return SuperNodeConfig(
            folder=self.home.state / "node",
            superlink=with_port(welcome.host, welcome.link_port),
            ca=self.home.ca,
            key=self.home.keys.node,
            port=self.home.settings.runtime_port or _free_port(),
            proxy=self.home.settings.proxy,
        )

    def note(self, kind: str, reason: str) -> None:
        """Writes a line to the audit log; where the disk refuses the line, the program's log says so."""
        try:
            self.audit.record(kind, now=self.clock(), reason=printable(reason))
        except DataError as error:
            log.warning("%s: %s, and %s", kind, reason, error)

    def room(self, manifest: JobManifest, package: bytes, size: int) -> PackageRoom:
        """Returns the disk that a job's package takes here, by the SHA-256 and the size of the encrypted package."""
        emulator, permitted = manifest.emulator_of(self.name), self.policy.max_disk_gb
        return PackageRoom.of(self.home.packages, emulator, package.hex(), size, permitted)

    def check_policy(self, manifest: JobManifest, package: bytes, size: int) -> None:
        """Checks a job and the size of its package against the owner's policy.

        Raises:
          PolicyRefusal: the policy does not permit the job, or the disk has too little room.
        """
        room = self.room(manifest, package, size)
        permit(self.policy, manifest, site=self.name, now=self.clock(), room=room)

    def is_approved(self, manifest: JobManifest) -> bool:
        """Says whether a job may train now; an approval that the owner took back does not count any more."""
        return self.policy.approval == "automatic" or manifest.digest().hex() in self.jobs.approved(self.clock())

    def reserve(self, manifest: JobManifest) -> None:
        """Sets an approved job aside in the ledger, where that was not done yet; once more changes nothing.

        Raises:
          PolicyRefusal, PrivacyRefusal: the declared number of records or the cap does not permit the job.
          ConfigError, DataError: the number of records is not declared, or the ledger cannot be written.
        """
        reserve(self.ledger, manifest, self.plan(manifest), now=self.clock())

    def close_others(self, manifest: JobManifest) -> None:
        """Closes the reserves of jobs that may not train now, so that what they have not spent is free again.

        These are the jobs whose approval the owner took back. Where approval is automatic, these are all jobs but the
        offered one: a coordinator could otherwise fill the cap with offers alone.

        Raises:
          DataError: the ledger is damaged, or cannot be written.
        """
        automatic = self.policy.approval == "automatic"
        kept = frozenset({manifest.digest().hex()}) if automatic else self.jobs.approved(self.clock())
        for job in sorted(self.ledger.reserved_jobs() - kept):
            self.ledger.close(job, now=self.clock())
            self.note("reserve closed", f"job {job[:12]} is not approved, or another job took its place")

    def plan(self, manifest: JobManifest) -> SitePlan:
        """Returns this site's plan of a job, from the declared number of records; raises as `reserve` does."""
        return site_plan(self.policy, manifest, places(self.home, manifest.split, manifest.task))

    def fetch(self, digest: str, size: int, target: Path, on_bytes: Callable[[int], None]) -> Path:
        """Fetches a package from the coordinator's depot, from where an earlier try ended; see `network.fetch`."""
        welcome = self.home.welcome
        address = DepotAddress(
            welcome.host,
            welcome.depot_port,
            ca=self.home.ca.read_bytes(),
            cert=self.home.certificate.read_bytes(),
            key=self.home.keys.tls.read_bytes(),
            proxy=self.home.settings.proxy,
        )
        return fetch(address, digest, size, target, on_bytes=on_bytes)

    def open_session(self, manifest: JobManifest, package: Path) -> EmulatorSession:
        """Opens a job's emulator, writes the vetting to the audit log, and measures a step; reads no record.

        Raises:
          OffsiteError: the emulator fails the vetting or the probe, is not the one that the manifest names, or the
            device cannot hold one record.
        """
        limits = VettingThresholds.for_owner(self.policy.max_rank, self.policy.max_adapter_share)
        settings, emulator = self.home.settings, manifest.emulator_of(self.name)
        seed = secrets.randbits(62)
        devices = choose_devices(settings.device, settings.processes)
        names = ", ".join(map(str, devices))
        log.info("job %s: vetted and trained on device=%s", manifest.digest().hex()[:12], names)
        for device in dict.fromkeys(devices):
            check_fits("the emulator", size_of(package) * devices.count(device), device, _SMALLER)
        session = open_session(
            package,
            manifest,
            emulator=emulator,
            limits=limits,
            seed=seed,
            weights=settings.weights,
            recompute=settings.recompute,
            device=devices[0],
            dtype=settings.dtype,
        )
        session.workers = Workers.beside(
            package,
            manifest,
            emulator=emulator,
            limits=limits,
            weights=settings.weights,
            recompute=settings.recompute,
            devices=devices,
            dtype=settings.dtype,
        )
        log.info("job %s: trained in dtype=%s", manifest.digest().hex()[:12], name_of(dtype_of(session.model)))
        self.audit.record(
            "vetted",
            now=self.clock(),
            job=manifest.digest().hex(),
            emulator=emulator,
            checks=[vetting.to_dict() for vetting in session.vetting],
        )
        try:
            cost = estimate(session, manifest, self.name)
        except BaseException:
            session.close()  # or its workers would hold their memory until the client ends
            raise
        self.jobs.keep_cost(manifest.digest().hex(), cost.line())
        log.info("job %s: %s", manifest.digest().hex()[:12], cost.line())
        return session

    def open_site(self, manifest: JobManifest, session: EmulatorSession) -> Site:
        """Opens this site for a job that its owner approved, with its ledger and its journal.

        Raises:
          DataError: the data cannot be read now, do not fit, or are not as many records as declared. The error never
            says which, because the reason follows from the data.
        """
        release_log = LedgerReleaseLog(self.ledger, manifest, audit=self.audit, clock=self.clock)
        journal, training_log = FileJournal(self.home.state / "journal.jsonl"), self.home.state / "rounds.jsonl"
        try:
            records = read_records_for_job(self.home, manifest.task)
            return self._site(self._site_job(manifest, session, records), release_log, journal, training_log)
        except Exception as error:  # the place where a program fails depends on the records that it reads
            self._tell_owner(manifest, "data do not fit", error)
            raise DataError("this site's data do not fit this job now; its owner sees why in the site's log") from None

    def open_dry_run(self, manifest: JobManifest, package: Path, training_log: Path) -> Site:
        """Opens this site for a rehearsal by its owner: no ledger is debited, and errors name the record.

        Raises:
          OffsiteError: the emulator fails the vetting, the data cannot be read or do not fit, or no record has
            anything to learn from.
        """
        session, records = self.open_session(manifest, package), self.records(manifest.task)
        release_log, job = CountingReleaseLog(manifest.releases), self._site_job(manifest, session, records)
        encoder = Encoder(session.task, session.processor, manifest.length, manifest.split, session.model.config)
        if (outcome := learnt(encoder, records, counted(job.examples))).nothing:
            raise DataError(str(outcome))
        if outcome.left_out:
            log.warning("%s", printable(str(outcome)))
        return self._site(job, release_log, MemoryJournal(), training_log)

    def records(self, task: str) -> list[Record]:
        """Returns this site's records with the fields that a task reads, for the site's owner.

        Raises:
          DataError: the records cannot be read, or a row is broken.
          ConfigError: `site.toml` names a field that no task has.
        """
        return read_records(self.home, task)

    def _tell_owner(self, manifest: JobManifest, kind: str, error: Exception) -> None:
        """Tells the owner alone why a job cannot use the data, once for each reason."""
        reason = printable(str(error) if isinstance(error, OffsiteError) else local_message(error))
        if self._reasons.get(manifest.digest()) != reason:
            self._reasons[manifest.digest()] = reason
            self.note(kind, reason)
            log.warning("job %s: %s", manifest.digest().hex()[:12], reason)

    def _site_job(self, manifest: JobManifest, session: EmulatorSession, records: list[Record]) -> SiteJob:
        if manifest.split != BLOCKS:
            check_count(self.home, len(records))
        plan, examples = self.plan(manifest), encode_records(session, manifest, records)
        if manifest.split == BLOCKS:
            log.info("blocks=%d of the texts, in %d declared places", len(examples), plan.records)
            examples = in_places(examples, plan.records)
        if len(examples) != plan.records:
            raise PolicyRefusal(f"examples={len(examples)}: {plan.records} are declared; each record is one example")
        for fault in records.faults[:MAX_FAULTS] if isinstance(records, LenientRecords) else ():
            log.warning("a record adds nothing: %s", printable(fault))
        if empty := (examples.targets == 0).reshape(-1).nonzero().reshape(-1).tolist():
            log.warning("records=%d: %d have nothing to learn from, and add nothing", len(examples), len(empty))
            if manifest.split != BLOCKS:  # a reason would cost time that depends on the record
                log.warning("the first: %s; dry-run says why", ", ".join(_places(records, empty[:MAX_FAULTS])))
        return SiteJob(self.name, manifest, session, examples, plan)

    def _site(self, job: SiteJob, release_log: ReleaseLog, journal: Journal, training_log: Path) -> Site:
        return Site(
            job,
            identity=self.home.keys.identity,
            journal=journal,
            release_log=release_log,
            training_log=training_log,
            randomness=SiteRandomness(self.name, self.home.settings.simulation_seed),
        )


def _places(records: list[Record], indices: list[int]) -> list[str]:
    return [printable(place_of(records, index)) for index in indices]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
