"""From a configuration to a job: full model, emulator package, gate, clip, manifest; public text only."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from adapter.layout import Layout
from adapter.methods import METHODS, attach
from adapter.spec import AdapterSpec
from coordinator.aggregate import AGGREGATORS
from coordinator.config import FedConfig
from coordinator.evaluate import Score, score, spread, spread_rows
from emulator import package
from emulator.calibrate import PublicExamples
from emulator.fidelity import check_gate, gradient_cosine
from emulator.files import model_sha256, tokenizer_sha256
from emulator.geometry import Geometry
from emulator.manifest import Manifest
from emulator.middle import Calibration
from emulator.refreshable import Frame, Refreshable
from errors import DataError, DigestMismatch, lookup
from privacy.accountants import ACCOUNTANTS
from privacy.clip import median_norm
from privacy.probe import choose_engine
from protos.manifest import JobManifest, PrivacyTerms
from task.examples import Examples
from task.spec import Task
from task.tasks import TASKS

CALIBRATION_EXAMPLES = 64
GATE_EXAMPLES = 8
CLIP_EXAMPLES = 16
# An update's entry is a clipped sum over an expected batch, which stays near C, plus noise of some sigma*C/batch. These
# factors leave ample room; an entry beyond is cut at the site, where it is counted.
PRIVATE_BOUND, PLAIN_BOUND = 4.0, 64.0
STAGE_SECONDS = 3600.0


@dataclass(frozen=True)
class Parties:
    """Who takes part in a job.

    Attributes:
      name, epoch: of the federation.
      roster: (site, Ed25519 key), sorted.
      n_min: fewest sites of a sum.
      job: identifier of the job; random, empty in a simulation.
    """

    name: str
    epoch: int
    roster: tuple[tuple[str, str], ...]
    n_min: int
    job: str = ""


@dataclass(frozen=True)
class PublicText:
    """Public examples by purpose: even ones tune, odd ones test, so that nothing is tested on what it was tuned on.

    Attributes:
      calibration: what compressors are fitted to.
      tune: for the gate and the clip.
      test: for every score.
    """

    calibration: Examples
    tune: Examples
    test: Examples


@dataclass(frozen=True)
class Job:
    """A prepared job at the coordinator.

    Attributes:
      manifest: what the sites get.
      emulator: manifest of the package.
      cosine: gradient cosine of the gate.
      full: full model with the adapter attached, at its start.
      layout: of the adapter.
      task: of the job.
      public: public examples.
      zero_shot: scores of full model and emulator on public text before any training.
      start: initial adapter, float32 (d,).
    """

    manifest: JobManifest
    emulator: Manifest
    cosine: float
    full: Any
    layout: Layout
    task: Task
    public: PublicText
    zero_shot: Mapping[str, Score]
    start: np.ndarray

    def facts(self) -> dict[str, Any]:
        """Returns what `reopen` needs beside the manifest."""
        return {
            "gradient_cosine": self.cosine,
            "zero_shot": {name: dataclasses.asdict(one) for name, one in self.zero_shot.items()},
        }


def check_names(config: FedConfig) -> None:
    """Looks every name of the configuration up before the first slow step.

    Raises:
      UnknownName: a table has no such entry.
    """
    lookup(TASKS, config.model.task, "model.task")
    lookup(METHODS, config.adapter.method, "adapter.method")
    lookup(AGGREGATORS, config.aggregation.rule, "aggregation.rule")
    lookup(ACCOUNTANTS, config.privacy.accountant, "privacy.accountant")


def public_text(config: FedConfig, task: Task, tokenizer: Any, texts: list[str]) -> PublicText:
    """Returns the public examples: even ones tune, odd ones test.

    Raises:
      DataError: too little public text.
    """
    examples = task.encode(tokenizer, texts, length=config.data.length, split=config.data.split)
    examples = examples.select(torch.nonzero(examples.targets))  # the others have no gradient to measure
    needed = 2 * max(CLIP_EXAMPLES, config.evaluation.public_examples)
    if len(examples) < needed:
        raise DataError(f"public records={len(examples)}: at least {needed} are needed; give more public text")
    tune = spread_rows(np.arange(0, len(examples), 2), max(CLIP_EXAMPLES, GATE_EXAMPLES))
    others = np.setdiff1d(np.arange(0, len(examples), 2), tune)
    return PublicText(
        # Where there is no more text than the tests need, a fit and the gate look at the same.
        calibration=examples.select(spread_rows(others if len(others) else tune, CALIBRATION_EXAMPLES)),
        tune=examples.select(tune),
        test=spread(examples, config.evaluation.public_examples, offset=1, stride=2),
    )


def prepare(
    config: FedConfig,
    *,
    texts: list[str],
    federation: Parties,
    folder: Path,
    on_step: Callable[[str], None],
) -> Job:
    """Builds everything that the coordinator does alone.

    Args:
      config: the federation file.
      texts: public texts.
      federation: who takes part.
      folder: where the emulator package goes; must be empty or absent.
      on_step: told what is being done.

    Raises:
      ConfigError: the emulator is below the gate, or a setting does not fit the model.
      UnsupportedModel, DataError: the model cannot be used; see `task` and `emulator`.
    """
    check_names(config)
    task = lookup(TASKS, config.model.task, "model.task")
    on_step("load the full model")
    tokenizer = task.load_tokenizer(config.model.path)
    public = public_text(config, task, tokenizer, texts)
    full = task.load(config.model.path, dtype=stored_dtype(Path(config.model.path)))
    geometry = Geometry.of(full, config.emulator.first, config.emulator.last, config.emulator.shape)
    spec = AdapterSpec(
        method=config.adapter.method,
        rank=config.adapter.rank,
        alpha=config.adapter.alpha,
        targets=config.adapter.targets,
        slots=geometry.slots(full),
        seed=config.seed,
    )

    on_step("build the emulator package")
    facts = _build(config, full, geometry, task, public, folder)
    full = full.float()  # training is float32; the package holds the slots' blocks as they were stored
    emulator = package.load(folder, dtype=torch.float32, expected_digest=facts.digest())
    if every := config.emulator.refresh:
        Refreshable.of(emulator, facts, Frame.of(folder, facts)).check_any(every, facts)

    on_step("gate: compare gradients through emulator and full model")
    gate = PublicExamples(task, public.tune, gradients=GATE_EXAMPLES)
    cosine = gradient_cosine(full, emulator, spec, gate.losses)
    check_gate(cosine, config.emulator.gate)

    on_step("score full model and emulator on public text")
    batch = config.training.physical_batch
    zero_shot = {
        "full": score(task, full, public.test, batch=batch),
        "emulator": score(task, emulator, public.test, batch=batch),
    }

    on_step("measure gradient norms on public text")
    clip = config.privacy.max_grad_norm or _median_norm(task, attach(emulator, spec), public.tune, batch)
    full = attach(full, spec)
    layout = Layout.of(full)
    manifest = _manifest(config, federation, facts, spec, layout, clip)
    return Job(manifest, facts, cosine, full, layout, task, public, zero_shot, layout.read(full))


def reopen(
    config: FedConfig, manifest: JobManifest, facts: Mapping[str, Any], *, texts: list[str], folder: Path
) -> Job:
    """Returns a job that `prepare` made earlier, from its manifest and `Job.facts`.

    Raises:
      DigestMismatch: the package in `folder`, or the model, is not the one of the manifest.
    """
    task = lookup(TASKS, manifest.task, "task")
    public = public_text(config, task, task.load_tokenizer(config.model.path), texts)
    package_facts = package.read_manifest(folder)
    full = attach(task.load(config.model.path, dtype=torch.float32), manifest.adapter)
    layout = Layout.of(full)
    for what, found, expected in (
        ("model", model_sha256(Path(config.model.path)), manifest.base),
        ("emulator", package_facts.digest(), manifest.emulator),
        ("layout", layout.digest().hex(), manifest.layout.digest().hex()),
    ):
        if found != expected:
            raise DigestMismatch(
                f"{what}={found[:16]}: run {str(folder.parent)!r} began with {expected[:16]}; put that one back, or "
                "start a new run"
            )
    zero_shot = {name: Score(**one) for name, one in facts["zero_shot"].items()}
    cosine = float(facts["gradient_cosine"])
    return Job(manifest, package_facts, cosine, full, layout, task, public, zero_shot, layout.read(full))


def stored_dtype(folder: Path) -> torch.dtype:
    """Returns the floating type that a model folder says its weights have; float32 where it says nothing."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return torch.float32  # the loader says what is wrong with the folder
    name = config.get("dtype") or config.get("torch_dtype")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)


def _build(config: FedConfig, full: Any, geometry: Geometry, task: Task, public: PublicText, folder: Path) -> Manifest:
    fitted = PublicExamples(task, public.calibration, config.training.physical_batch)
    compared = PublicExamples(task, public.tune, gradients=GATE_EXAMPLES)
    return package.build(
        full,
        geometry,
        config.emulator.compress,
        config.emulator.embedding,
        Calibration(fitted.run, compared.losses),
        folder,
        tokenizer=Path(config.model.path),
    )


def _median_norm(task: Task, model: nn.Module, examples: Examples, batch: int) -> float:
    engine = choose_engine(model, task.losses, examples.select([0, 1]))
    batches = [
        examples.select(list(range(start, min(start + batch, len(examples)))))
        for start in range(0, len(examples), batch)
    ]
    return median_norm(model, task.losses, batches, engine)


def _manifest(
    config: FedConfig,
    federation: Parties,
    facts: Manifest,
    spec: AdapterSpec,
    layout: Layout,
    clip: float,
) -> JobManifest:
    training, privacy = config.training, config.privacy
    factor = PRIVATE_BOUND if privacy.private else PLAIN_BOUND
    return JobManifest(
        federation=federation.name,
        epoch=federation.epoch,
        roster=federation.roster,
        n_min=federation.n_min,
        task=config.model.task,
        emulator=facts.digest(),
        base=model_sha256(Path(config.model.path)),
        tokenizer=tokenizer_sha256(facts.files),
        adapter=spec,
        layout=layout,
        length=config.data.length,
        split=config.data.split,
        rounds=training.rounds,
        local_steps=training.local_steps,
        learning_rate=training.learning_rate,
        update_bound=factor * clip * training.learning_rate * training.local_steps,
        privacy=PrivacyTerms(privacy.private, privacy.epsilon, clip, privacy.accountant, training.batch),
        physical_batch=training.physical_batch,
        spare_rounds=training.spare_rounds,
        model=Path(config.model.path).name,
        release=version("offsite"),
        identifier=federation.job,
        deadline=config.coordinator.deadline if config.coordinator else STAGE_SECONDS,
        refresh=config.emulator.refresh,
    )
