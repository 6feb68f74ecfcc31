"""`offsite simulate`: a whole federation on one machine, with every real part in its place."""

import dataclasses
import hashlib
import platform
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from offsite.adapter.export import export, in_peft_format
from offsite.adapter.methods import METHODS
from offsite.client.site.round_handler import answer
from offsite.client.training.emulator_session import EmulatorSession
from offsite.client.training.privacy_plan import SitePlan, plan_for
from offsite.coordinator.aggregation.rules import AGGREGATORS
from offsite.coordinator.job.evaluate import Score, score, spread
from offsite.coordinator.job.prepare import Job, Parties, prepare, reopen
from offsite.coordinator.job.store import Progress
from offsite.coordinator.report.aggregation_section import SAID_OPENLY, facts_of
from offsite.coordinator.report.write import write_report
from offsite.coordinator.rounds.attempt import Attempts
from offsite.coordinator.rounds.counter import MonotonicCounter
from offsite.coordinator.rounds.exchange import Exchange, MemoryExchange
from offsite.coordinator.rounds.round_loop import TrainingLoop
from offsite.emulator.runtime.plug_in import plug
from offsite.errors import ConfigError, lookup
from offsite.privacy.accountants import ACCOUNTANTS
from offsite.privacy.events import Event
from offsite.protos.job_manifest import JobManifest
from offsite.simulation.resource_meter import Meter
from offsite.simulation.run_folder import Run, simulated_sessions
from offsite.task.spec import Batch
from offsite.trust.files import sha256_file

PACKAGES = ("offsite", "torch", "transformers", "peft", "opacus", "dp-accounting", "flwr", "cryptography", "numpy")


class Display(Protocol):
    """What a run tells the person at the terminal."""

    def step(self, text: str) -> None:
        """Says what is being done now."""

    def call(self, stage: str, site: str) -> None:
        """Says which site is being asked for what."""

    def round(self, line: dict[str, Any], planned: int) -> None:
        """Shows a finished round."""


Sessions = Mapping[str, EmulatorSession]  # each site's
Engine = Callable[[Run, JobManifest, Sessions, Display, Callable[[Exchange], Progress]], Progress]


def memory_engine(
    run: Run, manifest: JobManifest, sessions: Sessions, display: Display, rounds: Callable[[Exchange], Progress]
) -> Progress:
    """Runs the rounds with all sites in this process; those of one emulator share it."""
    sites = {name: run.site(name, manifest, session) for name, session in sorted(sessions.items())}
    return rounds(MemoryExchange({name: partial(answer, site) for name, site in sites.items()}, display.call))


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says about one run, beside the configuration.

    Attributes:
      engine: how the rounds are carried.
      engine_name: its name, for the report.
      display: shows progress.
      now: wall clock at the start, ISO 8601.
    """

    engine: Engine
    engine_name: str
    display: Display
    now: str


def simulate(run: Run, options: Options) -> dict[str, Any]:
    """Runs a federation from the beginning, or on from the last whole round, and writes its report.

    Returns:
      The report, as in `report.json`.

    Raises:
      OffsiteError: with what to change; the run folder then stands at the last whole round.
    """
    meter, display = Meter(), options.display
    with meter.phase("build"):
        job = _job(run, display)
        sessions = simulated_sessions(run, job.manifest)
        session = sessions[job.emulator.sites[0]]
        plans = _plans(run, job, session)
    federation = _federation(run, job)
    if job.manifest.aggregation.individuals:
        display.step(SAID_OPENLY)
    with meter.phase("train") as phase:
        progress = options.engine(
            run,
            job.manifest,
            sessions,
            display,
            lambda exchange: federation.run(exchange, lambda line: display.round(line, job.manifest.rounds)),
        )
        lines = run.store.rounds()
        phase.bytes_down = sum(line["bytes_down"] for line in lines)
        phase.bytes_up = sum(line["bytes_up"] for line in lines)
    display.step("score on held-out records")
    with meter.phase("evaluate"):
        quality = _quality(run, job, session, progress)
    plug(job.full, job.layout, progress.plugged)
    base = Path(run.config.model.path).name
    export(job.full, job.manifest.adapter, run.store.adapter, base=base, given=job.given)
    meter.phases["build"].bytes_down = sum(one.facts.package_bytes * len(one.sites) for one in job.emulators)
    report = _report(run, job, options, progress, plans, quality, meter)
    write_report(run.store.folder, report)
    return report


def _job(run: Run, display: Display) -> Job:
    """Prepares the job, or opens the one this run was prepared for."""
    if (manifest := run.job()) is not None:
        display.step("open the prepared job")
        facts = run.store.read_json("job_facts.json")
        return reopen(run.config, manifest, facts, records=run.records(run.config.data.public), store=run.store)
    records = run.records(run.config.data.public)
    setting = run.config.secagg
    parties = Parties(setting.federation, 1, run.roster(), setting.n_min)
    job = prepare(run.config, records=records, federation=parties, store=run.store, on_step=display.step)
    run.save_job(job.manifest, job.facts())
    return job


def _plans(run: Run, job: Job, session: EmulatorSession) -> dict[str, SitePlan]:
    plans = {}
    for site in run.config.sites:
        examples = run.examples(site.train, job.manifest, session)
        plans[site.name] = plan_for(job.manifest, len(examples))
    return plans


def _federation(run: Run, job: Job) -> TrainingLoop:
    folder = run.store.folder
    attempts = Attempts(folder, lambda: secrets.token_bytes(32), MonotonicCounter(folder / "aggregations.txt"))
    return TrainingLoop(job, run.config, run.store, attempts)


def _quality(run: Run, job: Job, session: EmulatorSession, progress: Progress) -> dict[str, Any]:
    """Scores full model and the default emulator, before and after, on held-out private and on public text."""
    start = job.start
    private = _heldout(run, job.manifest, session)
    batch = job.manifest.physical_batch
    numbers: dict[str, dict[str, Score]] = {
        "private": {},
        "public": {"full_zero_shot": job.zero_shot, "emulator_zero_shot": job.emulator.public},
    }

    def measure(name: str, model: Any, adapter: np.ndarray, parts: list[Batch], kind: str) -> None:
        plug(model, job.layout, adapter)
        numbers[kind][name] = score(job.task, model, *parts, batch=batch)

    measure("full_zero_shot", job.full, start, private, "private")
    session.refresh(())
    measure("emulator_zero_shot", session.model, start, private, "private")
    session.refresh(progress.refresh)
    tuned_models = (("emulator_tuned", session.model, progress.server.adapter), ("plug_in", job.full, progress.plugged))
    for name, model, tuned in tuned_models:
        measure(name, model, tuned, private, "private")
        measure(name, model, tuned, [job.public.test], "public")
    scores = {kind: {k: dataclasses.asdict(v) for k, v in found.items()} for kind, found in numbers.items()}
    gain = numbers["private"]["full_zero_shot"].loss - numbers["private"]["plug_in"].loss
    forgetting = numbers["public"]["plug_in"].loss - numbers["public"]["full_zero_shot"].loss
    return {**scores, **scores["private"], "gain_nats": gain, "forgetting_nats": forgetting}


def _heldout(run: Run, manifest: JobManifest, session: EmulatorSession) -> list[Batch]:
    """Returns held-out records of each site, the same number as far as they go."""
    share = max(1, run.config.evaluation.examples // len(run.config.sites))
    return [spread(run.examples(site.heldout, manifest, session), share) for site in run.config.sites]


def _report(
    run: Run,
    job: Job,
    options: Options,
    progress: Progress,
    plans: dict[str, SitePlan],
    quality: dict[str, Any],
    meter: Meter,
) -> dict[str, Any]:
    lines, manifest = run.store.rounds(), job.manifest
    return {
        "format": 1,
        "mode": "simulation",
        "engine": options.engine_name,
        "rounds_planned": manifest.rounds,
        "finished_rounds": progress.round,
        "quality": quality,
        "emulator": _emulator_facts(run, job),
        "adapter": _adapter_facts(job),
        "privacy": _privacy_facts(run, manifest, plans),
        "aggregation": facts_of(lookup(AGGREGATORS, run.config.aggregation.rule, "rule")),
        "secagg": {
            "enabled": not manifest.aggregation.individuals,
            "suite": 1,
            "members": lines[-1]["members"] if lines else [],
            "threshold": lines[-1]["threshold"] if lines else 0,
            "dropped": [one | {"round": line["round"]} for line in lines for one in line["dropped"]],
            "upload_bytes": max((line["upload_bytes"] for line in lines), default=0),
            "payload_bytes": max((line["payload_bytes"] for line in lines), default=0),
            "rounds": len(lines),
        },
        "rounds": [line | {"site_losses": _site_losses(run, manifest, line["round"])} for line in lines],
        "cost": meter.to_dict(),
        "warnings": _warnings(job, lines, quality),
        "provenance": {
            "seed": run.config.seed,
            "config_sha256": run.config_sha256,
            "model_sha256": _model_sha256(Path(run.config.model.path)),
            "job_sha256": manifest.digest().hex(),
            "versions": {name: version(name) for name in PACKAGES},
            "started": options.now,
            "platform": platform.platform(),
        },
    }


def _emulator_facts(run: Run, job: Job) -> dict[str, Any]:
    facts, config = job.emulator.facts, run.config.emulator
    return job.emulator.report() | {
        "full_bytes": facts.full_bytes,
        "slot_bytes": facts.slot_bytes,
        "embedding_bytes": facts.embedding_bytes,
        "middle_bytes": facts.middle_bytes,
        "middle_ratio": facts.middle_ratio,
        "verbatim_share": facts.verbatim,
        "gate": config.gate,
        "variants": [one.report() for one in job.emulators[1:]],
    }


def _adapter_facts(job: Job) -> dict[str, Any]:
    spec = job.manifest.adapter
    method = METHODS[spec.method]
    return {
        "method": spec.method,
        "rank": spec.rank,
        "alpha": spec.alpha,
        "targets": list(spec.targets),
        "slots": list(spec.slots),
        "parameters": job.layout.size,
        "exact_mean": method.exact_mean,
        "why": method.why,
        "options": dict(spec.options),
        "peft": in_peft_format(spec),
        "directory": "adapter",
    }


def _privacy_facts(run: Run, manifest: JobManifest, plans: dict[str, SitePlan]) -> dict[str, Any]:
    terms = manifest.privacy
    record = f"a block of {manifest.length} tokens" if manifest.split == "blocks" else "one row"
    return {
        "private": terms.private,
        "unit": f"one record: {record} of one site's data",
        "accountant": terms.accountant,
        "target_epsilon": terms.epsilon if terms.private else None,
        "noise_source": "derived from the run's seed: a simulation, not private against anyone who knows the seed",
        "sites": [_site_privacy(run, manifest, name, plan) for name, plan in sorted(plans.items())],
    }


def _site_privacy(run: Run, manifest: JobManifest, name: str, plan: SitePlan) -> dict[str, Any]:
    lines, terms = run.site_lines(name), manifest.privacy
    done = np.cumsum([line["steps"] for line in lines]).tolist()
    spent = [_epsilon(terms.accountant, plan, int(steps)) for steps in done] if terms.private else []
    return {
        "site": name,
        "records": plan.records,
        "epsilon": (spent[-1] if spent else 0.0) if terms.private else None,
        "epsilon_by_round": spent,
        "delta": plan.delta,
        "noise_multiplier": plan.noise_multiplier,
        "max_grad_norm": terms.max_grad_norm,
        "sample_rate": plan.sample_rate,
        "steps": int(done[-1]) if done else 0,
        "engine": lines[-1]["engine"] if lines else "",
        "clipped_fraction": float(np.mean([line["clipped_fraction"] for line in lines])) if lines else 0.0,
    }


def _epsilon(accountant: str, plan: SitePlan, steps: int) -> float:
    return ACCOUNTANTS[accountant]([Event(plan.noise_multiplier, plan.sample_rate, steps)], plan.delta)


def _site_losses(run: Run, manifest: JobManifest, number: int) -> dict[str, float]:
    """Returns each site's mean training loss in a round; only a simulation can, since a site tells nobody."""
    found = {}
    for name, _ in manifest.roster:
        for line in run.site_lines(name):
            losses = [loss for loss in line["losses"] if loss is not None and np.isfinite(loss)]
            if line["round"] == number and losses:
                found[name] = float(np.mean(losses))
    return found


def _warnings(job: Job, lines: list[dict[str, Any]], quality: dict[str, Any]) -> list[str]:
    warnings = []
    method = METHODS[job.manifest.adapter.method]
    if job.manifest.aggregation.individuals:
        warnings.append("secure aggregation is off: the coordinator saw each site's own update")
    if not job.manifest.privacy.private:
        warnings.append("privacy is off: gradients were neither clipped nor noised, epsilon is unbounded")
    if not method.exact_mean:
        warnings.append(f"method {method.name}: the mean of the uploads is not the mean of their effects; {method.why}")
    rejected = [line["round"] for line in lines if not line["accepted"]]
    if rejected:
        warnings.append(f"rounds {rejected} were not taken over: public loss rose by more than the tolerance")
    if quality["gain_nats"] <= 0:
        warnings.append("the plug-in is not better than the untrained full model on held-out private text")
    if (dropped := sum(len(line["dropped"]) for line in lines)) > 0:
        warnings.append(f"{dropped} times a site dropped out of a round; see secagg.dropped")
    return warnings


def _model_sha256(folder: Path) -> str:
    """Returns one hash over the model's weight files, by name."""
    state = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"model.path={str(folder)!r}: no safetensors file; give a model folder")
    for file in files:
        state.update(f"{file.name}:{sha256_file(file)}\n".encode())
    return state.hexdigest()
