"""The end of a job between organisations: the adapter, and a report with the coordinator's knowledge."""

from dataclasses import dataclass
from pathlib import Path

from offsite.adapter.export import export
from offsite.adapter.model_card import base_name
from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.job.evaluate import score
from offsite.coordinator.job.generated import generated_scores
from offsite.coordinator.job.prepare import Job
from offsite.coordinator.job.public_records import passed_over
from offsite.coordinator.job.round_record import RoundRecord
from offsite.coordinator.job.store import Progress, Store
from offsite.coordinator.report import facts
from offsite.coordinator.report.data_facts import DataFacts
from offsite.coordinator.report.model import FEDERATION, Report
from offsite.coordinator.report.privacy_facts import PrivacyFacts, SitePrivacy
from offsite.coordinator.report.quality_facts import FourScores, Quality
from offsite.coordinator.report.write import write_report
from offsite.coordinator.rounds.emulator_refresh import DeployedEmulator
from offsite.emulator.runtime.plug_in import plug
from offsite.protos.job_manifest import JobManifest
from offsite.task.nothing_to_learn import PUBLIC

NOISE = (
    "each site's own randomness from its operating system, unless the site's owner permits noise from a seed in "
    "policy.toml (allow_seeded_noise); noise from a seed protects nobody and is for tests on invented data, and the "
    "coordinator cannot know whether an owner permits it"
)
NO_NOISE = "none: the job is not private"
NUMBERS_OF_SITES = (
    "The coordinator cannot know a site's number of records, sampling rate, noise multiplier and delta, the epsilon "
    "that the site has spent, and the share of gradients that were clipped. No answer of a site carries these numbers."
)
COUNTS_OF_SITES = (
    "The coordinator cannot know a site's number of records. No answer of a site carries that number. The site's "
    "owner knows the number."
)
WHO_CAN = (
    'A site\'s owner can know them: the command "offsite client dry-run FOLDER JOB" at the site shows the numbers that '
    'this job is planned with, "offsite client audit verify FOLDER" shows the epsilon that all jobs together have '
    "spent by the site's ledger, and the site's rounds.jsonl holds the share that was clipped."
)


@dataclass(frozen=True)
class Started:
    """The facts of the start of a run that its report repeats.

    Attributes:
      config_sha256: SHA-256 of the federation file, hexadecimal.
      at: wall clock at the start, ISO 8601.
    """

    config_sha256: str
    at: str


def conclude(config: FedConfig, store: Store, job: Job, progress: Progress, started: Started) -> Report:
    """Writes the adapter and the report of a job whose rounds are all whole, and returns the report."""
    scores, adapters = _public_scores(store, job, progress), (job.start, progress.plugged)
    texts = generated_scores(config, job.full, job.layout, adapters, PUBLIC, [job.public.tested])
    quality = Quality(scores, generated=texts)
    base = base_name(Path(config.model.path).name, config.model.base)
    export(job.full, job.manifest.adapter, store.adapter, base=base, auxiliary=job.given)
    report = federation_report(config, job, progress, store.rounds(), quality, started)
    write_report(store.folder, report)
    return report


def federation_report(
    config: FedConfig,
    job: Job,
    progress: Progress,
    records: tuple[RoundRecord, ...],
    quality: Quality,
    started: Started,
) -> Report:
    """Returns the report of a job between organisations.

    Args:
      config: the federation file.
      job: the job.
      progress: state of the job after its last whole round.
      records: records of all whole rounds, in order.
      quality: scores on public records.
      started: facts of the start of the run.
    """
    data = (DataFacts.of(PUBLIC, "", job.public.learnt, passed_over(config, config.data.public)),)
    return Report(
        mode=FEDERATION,
        engine="superlink",
        rounds_planned=job.manifest.rounds,
        finished_rounds=progress.round,
        quality=quality,
        emulators=facts.emulator_facts(job, config.emulator.gate),
        adapter=facts.adapter_facts(job),
        privacy=_privacy(job.manifest, records),
        aggregation=facts.rule_facts(config),
        secagg=facts.secagg_facts(job.manifest, records),
        rounds=records,
        cost=None,
        warnings=facts.warnings_of(config, job, records, quality, data),
        provenance=facts.provenance_of(config, started.config_sha256, job, started.at),
        data=data,
    )


def _public_scores(store: Store, job: Job, progress: Progress) -> FourScores:
    """Scores the tuned models on public records; the full model holds the plugged-in adapter afterwards."""
    tuned = DeployedEmulator.open(store.package, job).tuned(progress)
    plug(job.full, job.layout, progress.plugged)
    plug_in = score(job.task, job.full, job.public.test, batch=job.manifest.physical_batch)
    return FourScores(job.zero_shot, job.emulator.public, tuned, plug_in)


def _privacy(manifest: JobManifest, records: tuple[RoundRecord, ...]) -> PrivacyFacts:
    terms = manifest.privacy
    engine = "zero_order" if manifest.aggregation.directions else ""
    return PrivacyFacts(
        private=terms.private,
        unit=facts.unit_of(manifest),
        accountant=terms.accountant,
        target_epsilon=terms.epsilon if terms.private else None,
        noise_source=NOISE if terms.private else NO_NOISE,
        sites=tuple(
            SitePrivacy(
                site,
                max_grad_norm=terms.max_grad_norm,
                engine=engine,
                rounds=sum(site in record.members for record in records),
            )
            for site, _ in manifest.roster
        ),
        not_known_here=(NUMBERS_OF_SITES, WHO_CAN) if terms.private else (COUNTS_OF_SITES,),
        max_grad_norm=terms.max_grad_norm,
        expected_batch=terms.batch,
    )
