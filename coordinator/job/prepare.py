"""From a configuration to a job, with public records only: full model, emulator packages, gate, clip, manifest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from offsite.adapter.auxiliary import AuxiliaryTensors
from offsite.adapter.layout import Layout
from offsite.adapter.methods import check_task, known
from offsite.adapter.spec import AdapterSpec
from offsite.coordinator.aggregation.compatibility import check_rule
from offsite.coordinator.aggregation.factor_rules import read_earlier
from offsite.coordinator.aggregation.rules import AGGREGATORS
from offsite.coordinator.config.emulator_table import EmulatorVariant
from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.config.training_tables import TrainingConfig
from offsite.coordinator.job.auxiliary_tensors import check_frozen, check_mask, collected
from offsite.coordinator.job.emulators import Emulator, EmulatorFactory, reopened
from offsite.coordinator.job.evaluate import score
from offsite.coordinator.job.full_model import compute_as_set, open_full_model
from offsite.coordinator.job.generated import try_generation
from offsite.coordinator.job.job_facts import JobFacts
from offsite.coordinator.job.model_hashes import model_hashes
from offsite.coordinator.job.public_records import PublicRecords, public_records
from offsite.coordinator.job.score import Score
from offsite.coordinator.job.store import Store
from offsite.emulator.compressors import steps_of
from offsite.emulator.package import auxiliary_file
from offsite.emulator.package.package_folder import model_sha256, tokenizer_sha256
from offsite.emulator.structure.geometry import Geometry
from offsite.errors import DigestMismatch, lookup
from offsite.privacy.accountants import ACCOUNTANTS
from offsite.protos.aggregation import AggregationTerms
from offsite.protos.job_manifest import JobManifest, PrivacyTerms
from offsite.task.model_fit import check_fit
from offsite.task.model_folder import check_folder
from offsite.task.spec import Record, Task
from offsite.task.tasks import TASKS
from offsite.task.text_measures import check_measures

# An entry of an update is a clipped sum over an expected batch, which stays near C, plus noise of some sigma*C/batch.
# These factors leave ample room; the site cuts and counts an entry beyond the bound.
PRIVATE_BOUND, PLAIN_BOUND = 4.0, 64.0
STAGE_SECONDS = 3600.0


@dataclass(frozen=True)
class Parties:
    """The members of a job.

    Attributes:
      name: name of the federation.
      epoch: number of the federation's epoch, from 1.
      roster: pairs (site, Ed25519 key in hexadecimal), sorted.
      n_min: smallest number of sites whose sum may be opened.
      accomplices: number of sites that may help the coordinator.
      job: random identifier of the job; empty in a simulation.
    """

    name: str
    epoch: int
    roster: tuple[tuple[str, str], ...]
    n_min: int
    accomplices: int
    job: str = ""


@dataclass(frozen=True)
class Job:
    """A prepared job at the coordinator.

    Attributes:
      manifest: terms of the job, which the sites get.
      emulators: emulators that are shipped, the default first.
      full: full model with the adapter attached, at the adapter's start.
      layout: layout of the adapter.
      task: task of the job.
      public: public examples.
      zero_shot: score of the full model on public records before any training.
      start: initial adapter, float32 (d,).
      hashes: SHA-256 of each file of the full model by name, hexadecimal.
      given: tensors that the adapter needs and does not train.
    """

    manifest: JobManifest
    emulators: tuple[Emulator, ...]
    full: Any
    layout: Layout
    task: Task
    public: PublicRecords
    zero_shot: Score
    start: np.ndarray
    hashes: Mapping[str, str]
    given: AuxiliaryTensors = field(default_factory=dict)

    @property
    def emulator(self) -> Emulator:
        """The default emulator, for every site without an entry in `emulator.variants`."""
        return self.emulators[0]

    def facts(self) -> JobFacts:
        """Returns the measurements that `reopen` needs beside the manifest."""
        return JobFacts(self.zero_shot, tuple(emulator.scores() for emulator in self.emulators))


def check_names(config: FedConfig, kinds: tuple[EmulatorVariant, ...], federation: Parties) -> None:
    """Looks up every name of the configuration, and checks that rule and method fit, before the first slow step.

    Raises:
      UnknownName: a table has no such entry.
      UnsupportedModel: the adapter's method is not offered.
      DataError: an earlier adapter cannot be read.
      ConfigError: the method has no such option, or does not take an earlier adapter; a step of a recipe cannot be
        read; measures of texts cannot be had, see `check_measures`; or the server rule does not fit the rest, see
        `check_rule`.
    """
    for kind in kinds:
        steps_of(kind.compress)
    lookup(TASKS, config.model.task, "model.task")
    known(config.adapter.spec(slots=(), seed=config.seed))
    check_task(config.adapter.method, config.model.task)
    check_frozen(config)
    check_mask(config)
    check_measures(config.evaluation.measures, config.model.task)
    check_rule(config, [site for site, _ in federation.roster], federation.n_min)
    lookup(ACCOUNTANTS, config.privacy.accountant, "privacy.accountant")


def prepare(
    config: FedConfig,
    *,
    records: Sequence[Record],
    federation: Parties,
    store: Store,
    on_step: Callable[[str], None],
) -> Job:
    """Builds a job from the federation file; the sites have no part in this.

    Args:
      config: the federation file.
      records: public records.
      federation: members of the job.
      store: run folder for the emulator packages; packages that a killed build left are removed.
      on_step: function that takes a text about what is being done.

    Raises:
      ConfigError: an emulator is below its gate, is for a site that the roster does not have, or does not fit the
        model.
      UnsupportedModel, DataError: the model cannot be used; see `task` and `emulator`.
    """
    kinds = config.emulator.kinds([site for site, _ in federation.roster])
    check_names(config, kinds, federation)
    task = lookup(TASKS, config.model.task, "model.task")
    processor = task.load_processor(config.model.path)
    check_fit(task, config.model.path, config.data.length, processor)  # its warnings are the check's before any work
    source = open_full_model(task, config, on_step)
    full: Any = source.model
    public = public_records(config, task, processor, records, full.config)
    geometry = Geometry.of(full, config.emulator.first, config.emulator.last, config.emulator.shape)
    spec = config.adapter.spec(slots=geometry.slots(full), seed=config.seed)

    given = collected(config, full, spec, task, public, on_step)
    factory = EmulatorFactory(config, kinds, task, public, geometry, spec, store, on_step, given)
    packages = factory.build(source)
    compute_as_set(config, source, on_step)  # not before: the package holds the slots' blocks in the stored dtype
    on_step("score the full model on public records")
    zero_shot = score(task, full, public.test, batch=config.training.physical_batch)
    emulators, clip = factory.measure(full, packages)
    full = source.attach(spec, given)
    try_generation(config, full, public.tested)
    layout = Layout.of(full)
    for folder in config.aggregation.earlier:
        read_earlier(folder, layout)
    hashes = model_hashes(Path(config.model.path), store)
    manifest = _manifest(config, federation, emulators, spec, layout, clip, model_sha256(hashes))
    return Job(manifest, emulators, full, layout, task, public, zero_shot, layout.read(full), hashes, given)


def reopen(
    config: FedConfig,
    manifest: JobManifest,
    facts: JobFacts,
    *,
    records: Sequence[Record],
    store: Store,
    on_step: Callable[[str], None],
) -> Job:
    """Returns a job that `prepare` made earlier, from its manifest and `Job.facts`; arguments as there.

    Raises:
      DigestMismatch: a package in the run folder, or the model, is another than the manifest's.
    """
    task = lookup(TASKS, manifest.task, "task")
    check_folder(Path(config.model.path))
    hashes = model_hashes(Path(config.model.path), store)
    emulators = reopened(store, manifest, facts.emulators)
    _check_same(store, "model", model_sha256(hashes), manifest.base)
    for emulator in emulators:
        _check_same(store, "emulator", emulator.facts.digest(), manifest.emulator_of(emulator.sites[0]))
    given = auxiliary_file.read(store.package, emulators[0].facts)
    source = open_full_model(task, config, on_step)
    compute_as_set(config, source, on_step)
    processor = task.load_processor(config.model.path)
    public = public_records(config, task, processor, records, source.model.config)
    full = source.attach(manifest.adapter, given)
    layout = Layout.of(full)
    _check_same(store, "layout", layout.digest().hex(), manifest.layout.digest().hex())
    return Job(manifest, emulators, full, layout, task, public, facts.zero_shot, layout.read(full), hashes, given)


def _check_same(store: Store, name: str, digest: str, expected: str) -> None:
    if digest != expected:
        raise DigestMismatch(
            f"{name}={digest[:16]}: run {str(store.folder)!r} began with {expected[:16]}; put that {name} back, or "
            "start a new run"
        )


def _most_moves(training: TrainingConfig) -> float:
    """Returns the number of whole steps in one entry of an upload: all steps of a round, or one direction's part."""
    return 1 / training.directions if training.directions else training.local_steps


def _manifest(
    config: FedConfig,
    federation: Parties,
    emulators: tuple[Emulator, ...],
    spec: AdapterSpec,
    layout: Layout,
    clip: float,
    base: str,
) -> JobManifest:
    training, privacy = config.training, config.privacy
    factor = PRIVATE_BOUND if privacy.private else PLAIN_BOUND
    return JobManifest(
        federation=federation.name,
        epoch=federation.epoch,
        roster=federation.roster,
        n_min=federation.n_min,
        accomplices=federation.accomplices,
        task=config.model.task,
        emulator=emulators[0].facts.digest(),
        base=base,
        tokenizer=tokenizer_sha256(emulators[0].facts.files),
        adapter=spec,
        layout=layout,
        length=config.data.length,
        split=config.data.split,
        rounds=training.rounds,
        local_steps=training.local_steps,
        learning_rate=training.learning_rate,
        update_bound=factor * clip * training.learning_rate * _most_moves(training),
        privacy=PrivacyTerms(privacy.private, privacy.epsilon, clip, privacy.accountant, training.batch),
        physical_batch=training.physical_batch,
        spare_rounds=training.spare_rounds,
        model=Path(config.model.path).name,
        release=version("offsite"),
        identifier=federation.job,
        deadline=config.coordinator.deadline if config.coordinator else STAGE_SECONDS,
        emulators=tuple(sorted((site, variant.facts.digest()) for variant in emulators[1:] for site in variant.sites)),
        refresh=config.emulator.refresh,
        aggregation=AggregationTerms(
            individuals=not config.secagg.enabled,
            proximal=config.aggregation.proximal,
            alternate=lookup(AGGREGATORS, config.aggregation.rule, "aggregation.rule").alternate,
            ranks=config.aggregation.ranks_by_site(),
            directions=training.directions,
            spacing=training.spacing if training.directions else 0.0,
        ),
    )
