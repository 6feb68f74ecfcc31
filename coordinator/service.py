"""A job between organisations, from the federation file to the tuned adapter; after a kill the same command resumes."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from offsite.coordinator.config.coordinator_table import CoordinatorConfig
from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.home.job_settings import settings_sha256
from offsite.coordinator.home.ledger_heads import Ledgers
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.coordinator.home.status import Status
from offsite.coordinator.job.lifecycle import finished, open_or_prepare
from offsite.coordinator.job.prepare import Job, Parties
from offsite.coordinator.job.round_record import RoundRecord
from offsite.coordinator.job.store import Progress, Store
from offsite.coordinator.network.depot import Depot, Tls
from offsite.coordinator.network.flower_exchange import GridExchange
from offsite.coordinator.network.flower_grid import LOST, why_lost
from offsite.coordinator.network.package_delivery import Delivery, deliver_all
from offsite.coordinator.network.readiness import ReadinessPolicy, ReadinessPoller
from offsite.coordinator.network.signed_exchange import SignedExchange
from offsite.coordinator.network.status_exchange import StatusReportingExchange
from offsite.coordinator.network.superlink_session import SuperLinkPlace, SuperLinkSession
from offsite.coordinator.rounds.attempt import Attempts
from offsite.coordinator.rounds.counter import MonotonicCounter
from offsite.coordinator.rounds.exchange import Conversation, Exchange
from offsite.coordinator.rounds.round_loop import TrainingLoop
from offsite.errors import ConfigError, DataError
from offsite.protos import codec
from offsite.protos.aggregation import NO_SECAGG_WARNING
from offsite.protos.flower_pieces import OTHER_BYTES, VALUE_BYTES
from offsite.protos.signed_job import sign_job
from offsite.trust import federation_manifest as owners
from offsite.trust.addresses import with_port
from offsite.trust.certificates import certificate_key

log = logging.getLogger("offsite.coordinator")
OFFER_SECONDS, FINISH_SECONDS = 20.0, 20.0
FRESH_SECONDS = 60.0  # time for which a list of ready sites holds
LINK_TRIES = 5  # number of lost links in a row without a whole round
ASKED = 2  # number of times that a connected site is asked for one stage
Deliveries = Mapping[str, Delivery]  # delivery of each site's package, by site


@dataclass(frozen=True)
class JobContext:
    """One job at one coordinator.

    Attributes:
      home: folder of the coordinator.
      config: the federation file.
      store: the run folder.
      status: status file of the coordinator.
      nonce: function that returns 32 fresh random bytes.
      now: function that returns the time.
      on_step: function that takes a text about what is being done.
      on_round: function that takes the record of each whole round.
      on_notice: function that takes a sentence that a person should see at once, for example which site refuses.
    """

    home: CoordinatorHome
    config: FedConfig
    store: Store
    status: Status
    nonce: Callable[[], bytes]
    now: Callable[[], datetime]
    on_step: Callable[[str], None]
    on_round: Callable[[RoundRecord], None]
    on_notice: Callable[[str], None] = lambda text: None

    @property
    def rules(self) -> CoordinatorConfig:
        """The table [coordinator] of the federation file.

        Raises:
          ConfigError: the federation file has no such table.
        """
        if self.config.coordinator is None:
            raise ConfigError("config key coordinator is missing; add [coordinator] with home = the folder of init")
        return self.config.coordinator


def run_job(context: JobContext) -> tuple[Job, Progress]:
    """Runs a job to its end, from the start or from the last whole round; a job with all rounds whole needs no site.

    Returns:
      The job, and its progress.

    Raises:
      OffsiteError: the job cannot go on; the message says what to change, and the run folder stands at the last whole
        round.
    """
    context.status.set("building")
    epoch = context.home.federation()
    job = open_job(context, epoch)
    if not job.manifest.aggregation.secure_aggregation:
        context.on_step(NO_SECAGG_WARNING)
    if (done := finished(context.store, job.manifest)) is not None:
        _attempts(context).close()  # the last round's attempt is open where a kill came before its close
        context.status.set("finishing", job=job.manifest.digest().hex(), rounds=done.round, round=done.round)
        return job, done
    deliveries = deliver_all(context.store, context.home.folder / "depot", job.manifest, epoch)
    with _depot(context.home, context.now):
        return job, _over_links(context, job, epoch, deliveries)


def _over_links(context: JobContext, job: Job, epoch: owners.FederationManifest, deliveries: Deliveries) -> Progress:
    """Runs the rounds, over a new link after each lost link, as long as whole rounds come between the losses.

    Raises:
      DataError: a link was lost too often.
    """
    losses, before = 0, _rounds(context.store)
    while True:
        try:
            return _over_link(context, job, epoch, deliveries)
        except LOST as error:
            if (done := finished(context.store, job.manifest)) is not None:
                return done  # only the farewell was lost
            reason, now = why_lost(error), _rounds(context.store)
            losses, before = (losses + 1 if now == before else 1), now
            context.status.set("link lost", detail=reason, awaited=[])
            log.warning("Flower's SuperLink was lost (%s); loss %d of %d", reason, losses, LINK_TRIES)
            if losses == LINK_TRIES:
                logged = context.home.link / "superlink.log"
                raise DataError(
                    f"link: Flower's SuperLink was lost {LINK_TRIES} times without a whole round ({reason}); see "
                    f"{logged}, then run again"
                ) from error


def _rounds(store: Store) -> int:
    return 0 if (progress := store.load_state()) is None else progress.round


def open_job(context: JobContext, epoch: owners.FederationManifest) -> Job:
    """Prepares the job, or opens the job that this run folder holds.

    Raises:
      Untrusted: the owners have signed another epoch since then, and the sites would refuse the rounds that are left.
      ConfigError: the run began with other settings.
    """
    roster = tuple((member.site, member.identity) for member in epoch.members)
    min_sites = max(epoch.n_min, context.config.secagg.n_min)
    parties = Parties(epoch.name, epoch.epoch, roster, min_sites, epoch.accomplices, job=context.nonce().hex())
    settings = settings_sha256(context.config)
    return open_or_prepare(context.config, parties, context.store, on_step=context.on_step, settings=settings)


def _over_link(context: JobContext, job: Job, epoch: owners.FederationManifest, deliveries: Deliveries) -> Progress:
    nodes = {member.site: member.node for member in epoch.members}
    context.on_step("start Flower's SuperLink")
    largest = VALUE_BYTES * job.manifest.layout.size + OTHER_BYTES
    with SuperLinkSession(link_place(context.home), nodes, largest=largest) as link:
        unopened: dict[str, str] = {}
        offers = _letters(context, epoch, link, OFFER_SECONDS, on_bad=unopened.__setitem__)
        ledgers = Ledgers(context.home.folder / "ledgers.json", context.home.identity)
        poller = _readiness_poller(context, job, epoch, deliveries, Offers(offers, ledgers, unopened))
        context.on_step("wait for the sites")
        context.status.set("waiting for sites", job=job.manifest.digest().hex(), rounds=job.manifest.rounds)
        rules = context.rules
        wanted = rules.sites or len(nodes)
        ready = poller.wait(ReadinessPolicy(wanted, job.manifest.n_min, rules.patience))
        exchange = StatusReportingExchange(
            _letters(context, epoch, link, job.manifest.deadline, tries=ASKED), context.status
        )
        farewell = _letters(context, epoch, link, FINISH_SECONDS)
        progress = _federation(context, job, ledgers).run(
            exchange, _on_round(context), _cohort(context, poller, ready, job.manifest.n_min), farewell
        )
        context.status.set("finishing", awaited=[])
        notice = codec.Notice("finish", "all rounds are done")
        Conversation(farewell).ask("finish", dict.fromkeys(nodes, notice), codec.Notice)
        return progress


def _cohort(
    context: JobContext, poller: ReadinessPoller, ready: tuple[str, ...], min_sites: int
) -> Callable[[], tuple[str, ...]]:
    """Returns a function that gives the sites of the next attempt: first `ready`, later the sites ready by then."""
    first, began = [ready], time.monotonic()

    def cohort() -> tuple[str, ...]:
        if (
            first and time.monotonic() - began < FRESH_SECONDS
        ):  # an attempt that was resumed first may have taken longer
            return first.pop()
        first.clear()
        context.status.set("waiting for sites")
        return poller.wait(ReadinessPolicy(min_sites, min_sites, context.rules.patience))

    return cohort


def _on_round(context: JobContext) -> Callable[[RoundRecord], None]:
    def show(record: RoundRecord) -> None:
        context.status.set("round done", round=record.round, stage="", awaited=[])
        context.on_round(record)

    return show


def _letters(
    context: JobContext,
    epoch: owners.FederationManifest,
    link: SuperLinkSession,
    deadline: float,
    *,
    tries: int = 1,
    on_bad: Callable[[str, str], None] = lambda site, reason: log.warning("site %s: %s", site, reason),
) -> SignedExchange:
    return SignedExchange(
        GridExchange(link.grid, nodes=link.node_ids, deadline=deadline),
        context.home.identity,
        epoch,
        MonotonicCounter(context.home.folder / "letters.txt"),
        on_bad,
        tries=tries,
    )


@dataclass(frozen=True)
class Offers:
    """The parts of an offer that all sites share.

    Attributes:
      exchange: exchange that carries the offers.
      ledgers: known heads of the sites' ledgers.
      unopened: reason why an answer was not opened, by site.
    """

    exchange: Exchange
    ledgers: Ledgers
    unopened: dict[str, str]


def _readiness_poller(
    context: JobContext, job: Job, epoch: owners.FederationManifest, deliveries: Deliveries, offers: Offers
) -> ReadinessPoller:
    manifest = job.manifest.to_bytes()
    signature = sign_job(context.home.identity, manifest)

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
        signatures=context.home.signatures(),
        ledgers=offers.ledgers,
        status=context.status,
        keep=context.home.add_signature,
        unopened=offers.unopened,
        current=context.home.federation,
        on_refusal=context.on_notice,
        on_change=context.on_step,
    )


def _federation(context: JobContext, job: Job, ledgers: Ledgers) -> TrainingLoop:
    tries = context.rules.attempts
    return TrainingLoop(job, context.config, context.store, _attempts(context), tries=tries, on_ledger=ledgers.learn)


def _attempts(context: JobContext) -> Attempts:
    return Attempts(context.store.folder, context.nonce, MonotonicCounter(context.home.folder / "aggregations.txt"))


def link_place(home: CoordinatorHome) -> SuperLinkPlace:
    """Returns the folder, address and keys of a coordinator's SuperLink."""
    settings = home.settings
    bind = settings.bind or settings.host
    return SuperLinkPlace(home.link, bind, settings.link_port, home.ca, home.server, home.server_key)


@contextmanager
def _depot(home: CoordinatorHome, now: Callable[[], datetime]) -> Iterator[Depot]:
    """Runs the depot while a job runs; the depot checks with every request whether a site was revoked."""
    tls = Tls(home.ca.read_bytes(), home.server.read_bytes(), home.server_key.read_bytes())

    def allowed(certificate: bytes) -> None:
        home.federation().check_valid(now())
        home.member_by_tls(certificate_key(certificate))

    settings = home.settings
    depot = Depot(
        home.folder / "depot",
        address=with_port(settings.bind or settings.host, settings.depot_port),
        tls=tls,
        allowed=allowed,
    )
    depot.start()
    try:
        yield depot
    finally:
        depot.stop()
