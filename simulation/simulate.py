"""`offsite simulate`: a whole federation on one machine, with every real part in its place."""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offsite.adapter.export import export
from offsite.client.training.emulator_session import EmulatorSession, encode_records
from offsite.client.training.privacy_plan import SitePlan, plan_for
from offsite.coordinator.job.evaluate import score
from offsite.coordinator.job.prepare import Job
from offsite.coordinator.job.score import Score
from offsite.coordinator.job.store import Progress
from offsite.coordinator.report.model import Report
from offsite.coordinator.report.quality_facts import FourScores, Quality
from offsite.coordinator.report.write import write_report
from offsite.coordinator.rounds.attempt import Attempts
from offsite.coordinator.rounds.counter import MonotonicCounter
from offsite.coordinator.rounds.round_loop import TrainingLoop
from offsite.emulator.runtime.plug_in import plug
from offsite.errors import DataError
from offsite.protos.aggregation import NO_SECAGG_WARNING
from offsite.protos.job_manifest import JobManifest
from offsite.simulation.engine import Display, Engine
from offsite.simulation.outcome import SimulationOutcome, simulation_report
from offsite.simulation.resource_meter import Meter
from offsite.simulation.run_folder import Run, simulated_sessions
from offsite.task.label_agreement import numbers_beside_names, only_numbers
from offsite.task.labels import names_of
from offsite.task.selection import spread
from offsite.task.spec import Batch


@dataclass(frozen=True)
class Options:
    """The options of one run beside the configuration.

    Attributes:
      engine: function that carries the rounds.
      engine_name: name of the engine, for the report.
      display: display that shows progress.
      now: wall clock at the start, ISO 8601.
    """

    engine: Engine
    engine_name: str
    display: Display
    now: str


def simulate(run: Run, options: Options) -> Report:
    """Runs a federation from the start or from the last whole round, and writes its report.

    Returns:
      The written report.

    Raises:
      OffsiteError: the run cannot go on; the message says what to change, and the run folder stands at the last whole
        round.
    """
    meter, display = Meter(), options.display
    with meter.phase("build") as building:
        job = run.open_job(display.step)
        sessions = simulated_sessions(run, job.manifest)
        session = sessions[job.emulator.sites[0]]
        plans = _plans(run, job, session, display)
        building.bytes_down = sum(emulator.facts.package_bytes * len(emulator.sites) for emulator in job.emulators)
    loop = _loop(run, job)
    if not job.manifest.aggregation.secure_aggregation:
        display.step(NO_SECAGG_WARNING)
    with meter.phase("train") as phase:
        progress = options.engine(
            run,
            job.manifest,
            sessions,
            display,
            lambda exchange: loop.run(exchange, lambda record: display.round(record, job.manifest.rounds)),
        )
        records = run.store.rounds()
        phase.bytes_down = sum(record.bytes_down for record in records)
        phase.bytes_up = sum(record.bytes_up for record in records)
    display.step("score on held-out records")
    with meter.phase("evaluate"):
        quality = _quality(run, job, session, progress)
    plug(job.full, job.layout, progress.plugged)
    base = Path(run.config.model.path).name
    export(job.full, job.manifest.adapter, run.store.adapter, base=base, auxiliary=job.given)
    report = simulation_report(
        run, job, SimulationOutcome(options.engine_name, options.now, progress.round, plans, quality, meter.costs())
    )
    write_report(run.store.folder, report)
    return report


def _plans(run: Run, job: Job, session: EmulatorSession, display: Display) -> dict[str, SitePlan]:
    plans, numbers = dict[str, SitePlan](), {"public": only_numbers(run.records(run.config.data.public))}
    for site in run.config.sites:
        try:
            records = run.records(site.train)
            plans[site.name] = plan_for(job.manifest, len(encode_records(session, job.manifest, records)))
        except DataError as error:
            raise DataError(f"site={site.name}: {error}") from error
        numbers[site.name] = only_numbers(records)
    config = session.model.config
    names = names_of(config) if getattr(config, "id2label", None) and False in numbers.values() else []
    if names and (warning := numbers_beside_names(numbers, names)):
        display.step(warning)
    return plans


def _loop(run: Run, job: Job) -> TrainingLoop:
    folder = run.store.folder
    attempts = Attempts(folder, lambda: secrets.token_bytes(32), MonotonicCounter(folder / "aggregations.txt"))
    return TrainingLoop(job, run.config, run.store, attempts)


def _quality(run: Run, job: Job, session: EmulatorSession, progress: Progress) -> Quality:
    """Scores full model and default emulator, before and after training, on held-out private and public records."""
    private, public = _heldout(run, job.manifest, session), [job.public.test]

    def measure(model: Any, adapter: np.ndarray, *kinds: list[Batch]) -> list[Score]:
        plug(model, job.layout, adapter)
        return [score(job.task, model, *parts, batch=job.manifest.physical_batch) for parts in kinds]

    (full_before,) = measure(job.full, job.start, private)
    session.refresh(())
    (emulator_before,) = measure(session.model, job.start, private)
    session.refresh(progress.refresh)
    emulator_private, emulator_public = measure(session.model, progress.server.adapter, private, public)
    full_private, full_public = measure(job.full, progress.plugged, private, public)
    return Quality(
        public=FourScores(job.zero_shot, job.emulator.public, emulator_public, full_public),
        private=FourScores(full_before, emulator_before, emulator_private, full_private),
    )


def _heldout(run: Run, manifest: JobManifest, session: EmulatorSession) -> list[Batch]:
    """Returns held-out records of each site, the same number of each site where a site has enough records."""
    share = max(1, run.config.evaluation.examples // len(run.config.sites))
    return [spread(run.examples(site.heldout, manifest, session), share) for site in run.config.sites]
