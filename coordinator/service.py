"""A job between organisations, from the federation file to the tuned adapter; killed at any moment, it goes on."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from offsite.coordinator.config.federation_file import CoordinatorConfig, FedConfig
from offsite.coordinator.home.ledger_heads import Ledgers
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.coordinator.home.run_folder import check_settings, keep_settings
from offsite.coordinator.home.status import Status
from offsite.coordinator.job.prepare import Job, Parties, prepare, reopen
from offsite.coordinator.job.store import Progress, Store, write_atomically
from offsite.coordinator.network.depot import Depot, Tls
from offsite.coordinator.network.flower_exchange import GridExchange
from offsite.coordinator.network.flower_grid import LOST, why_lost
from offsite.coordinator.network.package_delivery import Delivery, deliver_all
from offsite.coordinator.network.readiness import ReadinessPolicy, ReadinessPoller
from offsite.coordinator.network.signed_exchange import SignedExchange
from offsite.coordinator.network.superlink_session import SuperLinkPlace, SuperLinkSession
from offsite.coordinator.report.aggregation_section import SAID_OPENLY
from offsite.coordinator.rounds.attempt import Attempts
from offsite.coordinator.rounds.counter import MonotonicCounter
from offsite.coordinator.rounds.exchange import Conversation, Exchange
from offsite.coordinator.rounds.round_loop import TrainingLoop
from offsite.errors import ConfigError, DataError, Untrusted
from offsite.protos import codec
from offsite.protos.job_manifest import JobManifest
from offsite.protos.signed_job import sign_job
from offsite.task.spec import Record
from offsite.trust import federation_manifest as owners
from offsite.trust.certificates import certificate_key

log = logging.getLogger("offsite.coordinator")
OFFER_SECONDS, FINISH_SECONDS = 20.0, 20.0
FRESH_SECONDS = 60.0  # for which who is ready is taken as known
UPLOAD_BYTES, OTHER_BYTES = 4, 8 << 20  # of an answer: an entry; shares, signatures and whatever stands around
LINK_TRIES = 5  # times in a row without a whole round
ASKED = 2  # times that a connected site is asked for one stage
Deliveries = Mapping[str, Delivery]  # each site's


@dataclass(frozen=True)
class JobContext:
    """One job at one coordinator.

    Attributes:
      home: the coordinator's folder.
      config: the federation file.
      store: run folder.
      status: where the job stands.
      records: public records.
      nonce: gives 32 fresh random bytes.
      now: gives the time.
      on_step: told what is being done.
      on_round: told each whole round's line.
    """

    home: CoordinatorHome
    config: FedConfig
    store: Store
    status: Status
    records: Sequence[Record]
    nonce: Callable[[], bytes]
    now: Callable[[], datetime]
    on_step: Callable[[str], None]
    on_round: Callable[[dict[str, Any]], None]

    @property
    def rules(self) -> CoordinatorConfig:
        """The table [coordinator] of the federation file.

        Raises:
          ConfigError: there is none.
        """
        if self.config.coordinator is None:
            raise ConfigError("config key coordinator is missing; add [coordinator] with home = the folder of init")
        return self.config.coordinator


def run_job(setting: JobContext) -> tuple[Job, Progress]:
    """Runs a job to its end, or on from where it stopped; one whose rounds are all whole needs no site any more.

    Returns:
      The job and where it stands.

    Raises:
      OffsiteError: with what to change; the run folder then stands at the last whole round.
    """
    setting.status.set("building")
    epoch = setting.home.federation()
    job = open_job(setting, epoch)
    if job.manifest.aggregation.individuals:
        setting.on_step(SAID_OPENLY)
    if (done := _done(setting.store, job.manifest)) is not None:
        _attempts(setting).close()  # the last round's, where the kill came before it was closed
        setting.status.set("finishing", job=job.manifest.digest().hex(), rounds=done.round, round=done.round)
        return job, done
    deliveries = deliver_all(setting.store, setting.home.folder / "depot", job.manifest, epoch)
    with _depot(setting.home, setting.now):
        return job, _over_links(setting, job, epoch, deliveries)


def _done(store: Store, manifest: JobManifest) -> Progress | None:
    """Returns where a job stands whose rounds are all whole, None for another."""
    progress = store.load_state()
    return progress if progress is not None and progress.round >= manifest.rounds else None


def _over_links(setting: JobContext, job: Job, epoch: owners.FederationManifest, deliveries: Deliveries) -> Progress:
    """Runs the rounds over one link after the other, as long as there are whole rounds between their losses.

    Raises:
      DataError: a link was lost too often.
    """
    tried, before = 0, _rounds(setting.store)
    while True:
        try:
            return _over_link(setting, job, epoch, deliveries)
        except LOST as error:
            if (done := _done(setting.store, job.manifest)) is not None:
                return done  # only the farewell was lost
            why, now = why_lost(error), _rounds(setting.store)
            tried, before = (tried + 1 if now == before else 1), now
            setting.status.set("link lost", detail=why, awaited=[])
            log.warning("Flower's SuperLink was lost (%s); loss %d of %d", why, tried, LINK_TRIES)
            if tried == LINK_TRIES:
                where = setting.home.link / "superlink.log"
                raise DataError(
                    f"link: Flower's SuperLink was lost {LINK_TRIES} times without a whole round ({why}); see {where}, "
                    "then run again"
                ) from error


def _rounds(store: Store) -> int:
    return 0 if (progress := store.load_state()) is None else progress.round


def open_job(setting: JobContext, epoch: owners.FederationManifest) -> Job:
    """Prepares the job, or opens the one that this run folder holds.

    Raises:
      Untrusted: the owners signed another epoch since, and rounds are left that its sites would refuse.
      ConfigError: the run began with other settings.
    """
    path = setting.store.folder / "job.json"
    if not path.exists():
        roster = tuple((member.site, member.identity) for member in epoch.members)
        min_sites = max(epoch.n_min, setting.config.secagg.n_min)
        parties = Parties(epoch.name, epoch.epoch, roster, min_sites, job=setting.nonce().hex())
        job = prepare(
            setting.config,
            records=setting.records,
            federation=parties,
            store=setting.store,
            on_step=setting.on_step,
        )
        setting.store.write_json("job_facts.json", job.facts())
        keep_settings(setting.store, setting.config)
        write_atomically(path, job.manifest.to_bytes())  # last: from here on the job is this one
        return job
    check_settings(setting.store, setting.config)
    manifest = JobManifest.from_bytes(path.read_bytes())
    if (manifest.federation, manifest.epoch) != (epoch.name, epoch.epoch) and _done(setting.store, manifest) is None:
        raise Untrusted(
            f"epoch={manifest.epoch}: this run was made under it, and the owners are at {epoch.epoch}; start a new run "
            "with --out FOLDER"
        )
    setting.on_step("open the prepared job")
    facts = setting.store.read_json("job_facts.json")
    return reopen(setting.config, manifest, facts, records=setting.records, store=setting.store)


def _over_link(setting: JobContext, job: Job, epoch: owners.FederationManifest, deliveries: Deliveries) -> Progress:
    nodes = {member.site: member.node for member in epoch.members}
    setting.on_step("start Flower's SuperLink")
    largest = UPLOAD_BYTES * job.manifest.layout.size + OTHER_BYTES
    with SuperLinkSession(link_place(setting.home), nodes, largest=largest) as link:
        unopened: dict[str, str] = {}
        offers = _letters(setting, epoch, link, OFFER_SECONDS, on_bad=unopened.__setitem__)
        ledgers = Ledgers(setting.home.folder / "ledgers.json", setting.home.identity)
        muster = _muster(setting, job, epoch, deliveries, Offers(offers, ledgers, unopened))
        setting.on_step("wait for the sites")
        setting.status.set("waiting for sites", job=job.manifest.digest().hex(), rounds=job.manifest.rounds)
        rules = setting.rules
        wanted = rules.sites or len(nodes)
        ready = muster.wait(ReadinessPolicy(wanted, job.manifest.n_min, rules.patience))
        exchange = _StatusReportingExchange(
            _letters(setting, epoch, link, job.manifest.deadline, tries=ASKED), setting.status
        )
        farewell = _letters(setting, epoch, link, FINISH_SECONDS)
        progress = _federation(setting, job, ledgers).run(
            exchange, _tell(setting), _cohort(setting, muster, ready, job.manifest.n_min), farewell
        )
        setting.status.set("finishing", awaited=[])
        notice = codec.Notice("finish", "all rounds are done")
        Conversation(farewell).ask("finish", dict.fromkeys(nodes, notice), codec.Notice)
        return progress


def _cohort(
    setting: JobContext, muster: ReadinessPoller, ready: tuple[str, ...], min_sites: int
) -> Callable[[], tuple[str, ...]]:
    """Returns who is asked: in the first round those who are ready, then whoever is there before each attempt."""
    first, began = [ready], time.monotonic()

    def cohort() -> tuple[str, ...]:
        if first and time.monotonic() - began < FRESH_SECONDS:  # not after an attempt that was resumed before it
            return first.pop()
        first.clear()
        setting.status.set("waiting for sites")
        return muster.wait(ReadinessPolicy(min_sites, min_sites, setting.rules.patience))

    return cohort


def _tell(setting: JobContext) -> Callable[[dict[str, Any]], None]:
    def tell(line: dict[str, Any]) -> None:
        setting.status.set("round done", round=line["round"], stage="", awaited=[])
        setting.on_round(line)

    return tell


class _StatusReportingExchange:
    """An exchange that says in the status what is awaited from whom."""

    def __init__(self, exchange: Exchange, status: Status) -> None:
        self._exchange, self._status = exchange, status

    def send(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        """Sends a stage."""
        self._status.set("in a round", stage=stage, awaited=sorted(payloads))
        return self._exchange.send(stage, payloads)


def _letters(
    setting: JobContext,
    epoch: owners.FederationManifest,
    link: SuperLinkSession,
    deadline: float,
    *,
    tries: int = 1,
    on_bad: Callable[[str, str], None] = lambda site, reason: log.warning("site %s: %s", site, reason),
) -> SignedExchange:
    return SignedExchange(
        GridExchange(link.grid, nodes=link.node_ids, deadline=deadline),
        setting.home.identity,
        epoch,
        MonotonicCounter(setting.home.folder / "letters.txt"),
        on_bad,
        tries=tries,
    )


@dataclass(frozen=True)
class Offers:
    """How offers are made: their exchange, what is known of the sites' ledgers, and why answers were not opened."""

    exchange: Exchange
    ledgers: Ledgers
    unopened: dict[str, str]


def _muster(
    setting: JobContext, job: Job, epoch: owners.FederationManifest, deliveries: Deliveries, offers: Offers
) -> ReadinessPoller:
    manifest = job.manifest.to_bytes()
    signature = sign_job(setting.home.identity, manifest)

    def offer_for(site: str, signatures: Mapping[str, bytes]) -> codec.Offer:
        return codec.Offer(
            manifest=manifest,
            manifest_signature=signature,
            owners=tuple(sorted(signatures.items())),
            package=deliveries[site].sha256,
            package_bytes=deliveries[site].size,
            sealed_key=deliveries[site].sealed[site],
            ledgers=offers.ledgers.countersigned(site),
        )

    return ReadinessPoller(
        offers.exchange,
        epoch,
        offer_for,
        signatures=setting.home.signatures(),
        ledgers=offers.ledgers,
        status=setting.status,
        keep=setting.home.add_signature,
        unopened=offers.unopened,
        current=setting.home.federation,
    )


def _federation(setting: JobContext, job: Job, ledgers: Ledgers) -> TrainingLoop:
    tries = setting.rules.attempts
    return TrainingLoop(job, setting.config, setting.store, _attempts(setting), tries=tries, on_ledger=ledgers.learn)


def _attempts(setting: JobContext) -> Attempts:
    return Attempts(setting.store.folder, setting.nonce, MonotonicCounter(setting.home.folder / "aggregations.txt"))


def link_place(home: CoordinatorHome) -> SuperLinkPlace:
    """Returns where the SuperLink of a coordinator lives."""
    settings = home.settings
    bind = settings.bind or settings.host
    return SuperLinkPlace(home.link, bind, settings.link_port, home.ca, home.server, home.server_key)


@contextmanager
def _depot(home: CoordinatorHome, now: Callable[[], datetime]) -> Iterator[Depot]:
    """Runs the depot while a job runs; who was revoked is looked up with every request."""
    tls = Tls(home.ca.read_bytes(), home.server.read_bytes(), home.server_key.read_bytes())

    def allowed(certificate: bytes) -> None:
        home.federation().check_valid(now())
        home.member_by_tls(certificate_key(certificate))

    settings = home.settings
    depot = Depot(
        home.folder / "depot",
        address=f"{settings.bind or settings.host}:{settings.depot_port}",
        tls=tls,
        allowed=allowed,
    )
    depot.start()
    try:
        yield depot
    finally:
        depot.stop()
