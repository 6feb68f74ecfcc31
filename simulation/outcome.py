"""The report of a simulation, with the sites' own numbers: one process holds the coordinator and all sites."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from offsite.client.training.privacy_plan import SitePlan
from offsite.coordinator.job.prepare import Job
from offsite.coordinator.job.round_record import RoundRecord
from offsite.coordinator.report import facts
from offsite.coordinator.report.data_facts import DataFacts
from offsite.coordinator.report.model import SIMULATION, PhaseCost, Report
from offsite.coordinator.report.privacy_facts import DELTAS, PrivacyFacts, SitePrivacy, short_delta
from offsite.coordinator.report.quality_facts import Quality
from offsite.privacy.accountants import ACCOUNTANTS, taken
from offsite.privacy.events import Event
from offsite.protos.job_manifest import JobManifest
from offsite.simulation.run_folder import Run

NOISE = "derived from the run's seed: a simulation, not private against anyone who knows the seed"


@dataclass(frozen=True)
class SimulationOutcome:
    """The results of a run that its folder does not hold.

    Attributes:
      engine: name of the engine.
      started: wall clock at the start, ISO 8601.
      finished_rounds: number of whole rounds.
      plans: privacy plan of each site, by site.
      quality: scores of the models.
      cost: cost of each phase, by phase.
      data: numbers of records and targets of each file.
    """

    engine: str
    started: str
    finished_rounds: int
    plans: Mapping[str, SitePlan]
    quality: Quality
    cost: Mapping[str, PhaseCost]
    data: tuple[DataFacts, ...]


def simulation_report(run: Run, job: Job, outcome: SimulationOutcome) -> Report:
    """Returns the report of a simulation."""
    manifest, records = job.manifest, run.store.rounds()
    return Report(
        mode=SIMULATION,
        engine=outcome.engine,
        rounds_planned=manifest.rounds,
        finished_rounds=outcome.finished_rounds,
        quality=outcome.quality,
        emulators=facts.emulator_facts(job, run.config.emulator.gate),
        adapter=facts.adapter_facts(job),
        privacy=_privacy(run, manifest, outcome.plans),
        aggregation=facts.rule_facts(run.config),
        secagg=facts.secagg_facts(manifest, records),
        rounds=tuple(_with_losses(run, manifest, record) for record in records),
        cost=outcome.cost,
        warnings=facts.warnings_of(run.config, job, records, outcome.quality, outcome.data),
        provenance=facts.provenance_of(run.config, run.config_sha256, job, outcome.started),
        data=outcome.data,
    )


def _privacy(run: Run, manifest: JobManifest, plans: Mapping[str, SitePlan]) -> PrivacyFacts:
    terms = manifest.privacy
    return PrivacyFacts(
        private=terms.private,
        unit=facts.unit_of(manifest),
        accountant=terms.accountant,
        target_epsilon=terms.epsilon if terms.private else None,
        noise_source=NOISE,
        sites=tuple(_site_privacy(run, manifest, name, plan) for name, plan in sorted(plans.items())),
    )


def _site_privacy(run: Run, manifest: JobManifest, name: str, plan: SitePlan) -> SitePrivacy:
    log, terms = run.site_log(name), manifest.privacy
    done = np.cumsum([entry.steps for entry in log]).tolist()
    spent = tuple(_epsilon(terms.accountant, plan, int(steps)) for steps in done) if terms.private else ()
    by = taken(terms.accountant, [_event(plan, int(done[-1]))], plan.delta) if spent else None
    return SitePrivacy(
        site=name,
        records=plan.records,
        epsilon=(spent[-1] if spent else 0.0) if terms.private else None,
        epsilon_by_round=spent,
        delta=plan.delta,
        epsilon_at=_epsilon_at(terms.accountant, plan, int(done[-1]) if done else 0) if terms.private else None,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=terms.max_grad_norm,
        sample_rate=plan.sample_rate,
        steps=int(done[-1]) if done else 0,
        engine=log[-1].engine if log else "",
        clipped_fraction=float(np.mean([entry.clipped_fraction for entry in log])) if log else 0.0,
        epsilon_by=by,
    )


def _epsilon(accountant: str, plan: SitePlan, steps: int) -> float:
    return _epsilon_of(accountant, plan.noise_multiplier, plan.sample_rate, steps, plan.delta)


def _epsilon_at(accountant: str, plan: SitePlan, steps: int) -> dict[str, float]:
    """Returns the epsilon of a number of steps at each delta of `DELTAS`."""
    mechanism = (accountant, plan.noise_multiplier, plan.sample_rate, steps)
    return {short_delta(delta): _epsilon_of(*mechanism, delta) if steps else 0.0 for delta in DELTAS}


@lru_cache(maxsize=256)  # sites with as many records have the same numbers
def _epsilon_of(accountant: str, noise: float, rate: float, steps: int, delta: float) -> float:
    return ACCOUNTANTS[accountant]([Event(noise, rate, steps)], delta)


def _event(plan: SitePlan, steps: int) -> Event:
    return Event(plan.noise_multiplier, plan.sample_rate, steps)


def _with_losses(run: Run, manifest: JobManifest, record: RoundRecord) -> RoundRecord:
    """Returns a record with each site's mean training loss, which a real site keeps to itself."""
    losses = {}
    for name, _ in manifest.roster:
        for entry in run.site_log(name):
            if entry.round == record.round and entry.mean_loss is not None:
                losses[name] = entry.mean_loss
    return replace(record, site_losses=losses)
