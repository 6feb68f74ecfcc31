"""`offsite simulate`: a whole federation on one machine, with every real part in its place."""

import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from offsite.adapter.export import export
from offsite.adapter.model_card import base_name
from offsite.client.training.emulator_session import EmulatorSession
from offsite.coordinator.job.evaluate import gain_error, record_losses, score
from offsite.coordinator.job.generated import generated_scores
from offsite.coordinator.job.prepare import Job
from offsite.coordinator.job.public_records import passed_over
from offsite.coordinator.job.score import Score
from offsite.coordinator.job.store import Progress
from offsite.coordinator.report.concluded import CONCLUDED, concluded
from offsite.coordinator.report.data_facts import DataFacts
from offsite.coordinator.report.model import Report
from offsite.coordinator.report.quality_facts import FourScores, Quality
from offsite.coordinator.report.write import write_report
from offsite.coordinator.rounds.attempt import Attempts
from offsite.coordinator.rounds.counter import MonotonicCounter
from offsite.coordinator.rounds.round_loop import TrainingLoop
from offsite.emulator.runtime.plug_in import plug
from offsite.protos.aggregation import NO_SECAGG_WARNING
from offsite.simulation.engine import Display, Engine
from offsite.simulation.outcome import SimulationOutcome, simulation_report
from offsite.simulation.resource_meter import Meter
from offsite.simulation.run_folder import Run, simulated_sessions
from offsite.simulation.site_data import site_data
from offsite.task.nothing_to_learn import HELD_OUT, PUBLIC
from offsite.task.spec import Batch
from offsite.trust.files import alone


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
    """Runs a federation from the start or from the last whole round, and writes its report; a written report stands.

    The run folder belongs to this process until the end, so that no other command takes the folder over.

    Returns:
      The written report.

    Raises:
      OffsiteError: the run cannot go on; the message says what to change, and the run folder stands at the last whole
        round.
    """
    with alone(run.store.folder, "a simulation"):
        if (report := concluded(run.store, run.config_sha256)) is not None:
            options.display.step(CONCLUDED)
            return report
        return _simulate(run, options)


def _simulate(run: Run, options: Options) -> Report:
    meter, display = Meter(), options.display
    with meter.phase("build") as building:
        job = run.open_job(display.step)
        sessions = simulated_sessions(run, job.manifest)
        session = sessions[job.emulator.sites[0]]
        data = site_data(run, job.manifest, session, display.step)
        building.bytes_down = sum(emulator.facts.package_bytes * len(emulator.sites) for emulator in job.emulators)
    loop = _loop(run, job)
    public = DataFacts.of(PUBLIC, "", job.public.learnt, passed_over(run.config, run.config.data.public))
    facts = (public, *data.facts)
    for warning in (line for own in facts for line in own.warnings):
        display.step(f"WARNING {warning}")
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
        quality = _quality(job, session, progress, list(data.heldout))
        adapters = (job.start, progress.plugged)
        texts = generated_scores(run.config, job.full, job.layout, adapters, HELD_OUT, data.asked)
    plug(job.full, job.layout, progress.plugged)
    base = base_name(Path(run.config.model.path).name, run.config.model.base)
    export(job.full, job.manifest.adapter, run.store.adapter, base=base, auxiliary=job.given)
    outcome = SimulationOutcome(
        options.engine_name,
        options.now,
        progress.round,
        data.plans,
        replace(quality, generated=texts),
        meter.costs(),
        facts,
    )
    report = simulation_report(run, job, outcome)
    write_report(run.store.folder, report)
    return report


def _loop(run: Run, job: Job) -> TrainingLoop:
    folder = run.store.folder
    attempts = Attempts(folder, lambda: secrets.token_bytes(32), MonotonicCounter(folder / "aggregations.txt"))
    return TrainingLoop(job, run.config, run.store, attempts)


def _quality(job: Job, session: EmulatorSession, progress: Progress, private: list[Batch]) -> Quality:
    """Scores full model and default emulator, before and after training, on held-out private and public records."""
    public, batch = [job.public.test], job.manifest.physical_batch

    def measure(model: Any, adapter: np.ndarray, *kinds: list[Batch]) -> list[Score]:
        plug(model, job.layout, adapter)
        return [score(job.task, model, *parts, batch=batch) for parts in kinds]

    (full_before,) = measure(job.full, job.start, private)
    losses_before = record_losses(job.task, job.full, *private, batch=batch)
    session.refresh(())
    (emulator_before,) = measure(session.model, job.start, private)
    session.refresh(progress.refresh)
    emulator_private, emulator_public = measure(session.model, progress.server.adapter, private, public)
    full_private, full_public = measure(job.full, progress.plugged, private, public)
    losses_after = record_losses(job.task, job.full, *private, batch=batch)
    return Quality(
        public=FourScores(job.zero_shot, job.emulator.public, emulator_public, full_public),
        private=FourScores(full_before, emulator_before, emulator_private, full_private),
        gain_error=gain_error(losses_before, losses_after),
    )
