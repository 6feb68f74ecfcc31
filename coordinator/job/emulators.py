"""The emulators of one job, one for all sites or several: each is built, gated, scored and measured in turn."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from offsite.adapter.auxiliary import AuxiliaryTensors
from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.coordinator.config.emulator_table import EmulatorVariant
from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.config.training_tables import TrainingConfig
from offsite.coordinator.job.evaluate import score
from offsite.coordinator.job.job_facts import EmulatorScores
from offsite.coordinator.job.public_records import GATE_EXAMPLES, PublicRecords
from offsite.coordinator.job.score import Score
from offsite.coordinator.job.store import Store
from offsite.emulator.build.built_before import BuiltPackage
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.calibration.source import Source
from offsite.emulator.evaluation.fidelity import check_gate, gradient_cosine
from offsite.emulator.package import package_reader
from offsite.emulator.package.manifest import Manifest
from offsite.emulator.runtime.refresh_state import Frame, Refreshable
from offsite.emulator.runtime.stored_model import holding
from offsite.emulator.runtime.weight_forms import STORED
from offsite.emulator.structure.geometry import Geometry
from offsite.errors import ConfigError, OffsiteError
from offsite.privacy.clipping_bound import median_norm
from offsite.privacy.probe import choose_engine
from offsite.privacy.zero_order import SEED_BYTES, Directions, median_slope
from offsite.protos.job_manifest import JobManifest
from offsite.task.device import device_of
from offsite.task.number_format import dtype_of
from offsite.task.spec import Batch, Task


@dataclass(frozen=True)
class Emulator:
    """One emulator of a job, as measured when it was built.

    Attributes:
      sites: names of the sites that get the emulator, sorted.
      facts: manifest of the emulator's package.
      cosine: gradient cosine of the gate, from -1 to 1.
      public: score of the emulator on public records before any training.
    """

    sites: tuple[str, ...]
    facts: Manifest
    cosine: float
    public: Score

    def scores(self) -> EmulatorScores:
        """Returns the measurements that `reopened` needs beside the package."""
        return EmulatorScores(self.sites, self.cosine, self.public)


@dataclass(frozen=True)
class EmulatorFactory:
    """Everything that the emulators of a job share; geometry and adapter are shared, so that updates can be added.

    Attributes:
      config: the federation file.
      kinds: emulators to build, the default first.
      task: task of the job.
      public: public examples.
      geometry: slots of the adapter, and the blocks between them.
      spec: specification of the adapter.
      store: the run folder.
      on_step: function that takes a text about what is being done.
      given: tensors that the adapter needs and does not train; the same in every package.
    """

    config: FedConfig
    kinds: tuple[EmulatorVariant, ...]
    task: Task
    public: PublicRecords
    geometry: Geometry
    spec: AdapterSpec
    store: Store
    on_step: Callable[[str], None]
    given: AuxiliaryTensors = field(default_factory=dict)

    def build(self, full: Source) -> list[Manifest]:
        """Writes the packages into the run folder and returns their manifests, in the order of `kinds`.

        Args:
          full: full model, in the dtype of its stored weights.

        Raises:
          OffsiteError: an emulator cannot be built; in a job with several emulators, the message names the sites.
        """
        self.store.clear_packages()
        fitted = PublicExamples(self.task, self.public.calibration, self.config.training.physical_batch)
        compared = PublicExamples(self.task, self.public.tune, gradients=GATE_EXAMPLES)
        manifests = []
        for kind in self.kinds:
            step = f"take the emulator package {kind.package}" if kind.package else "build the emulator package"
            with self._named(kind, step):
                if kind.package:
                    manifests.append(self._taken(full, kind))
                    continue
                facts = write_package(
                    full,
                    EmulatorDesign(self.geometry, kind.compress, kind.embedding),
                    Calibration(fitted.run, compared.losses),
                    self._folder(kind),
                    tokenizer=Path(self.config.model.path),
                    auxiliary=self.given,
                )
            manifests.append(facts)
        self._check_different(manifests)
        return manifests

    def _check_different(self, manifests: list[Manifest]) -> None:
        """Refuses two entries with one emulator, which the job's manifest could not tell apart."""
        sites = dict[str, tuple[str, ...]]()
        for kind, facts in zip(self.kinds, manifests, strict=True):
            if (others := sites.setdefault(facts.digest(), kind.sites)) != kind.sites:
                raise ConfigError(
                    f"emulator of sites={', '.join(kind.sites)}: is the emulator of sites={', '.join(others)} too; "
                    "name all of these sites in one entry, or none of them"
                )

    def _taken(self, full: Any, kind: EmulatorVariant) -> Manifest:
        """Copies a package that was built before into the run folder, and refuses a package of anything else.

        The check before the run compared the same; files may have changed since then.
        """
        built = BuiltPackage.open(Path(kind.package))
        geometry = self.geometry
        misfits = built.misfits(geometry.first, geometry.last, geometry.shape, Path(self.config.model.path))
        for fault in (*misfits, *built.differences(full)):
            raise ConfigError(f"emulator.package={kind.package!r} {fault}")
        return built.copy_to(self._folder(kind), self.given)

    def measure(self, full: Any, packages: list[Manifest]) -> tuple[tuple[Emulator, ...], float]:
        """Gates and scores every emulator, with one emulator in memory at a time.

        Args:
          full: full model without an adapter, in the number format of the job; its weights are left as they were.
          packages: manifests of the emulators, in the order of `kinds`.

        Returns:
          The emulators, and the clip of one record's gradient.

        Raises:
          ConfigError: an emulator is below its gate; in a job with several emulators, the message names the sites.
          DigestMismatch: an emulator takes another adapter than the full model.
        """
        pairs = [self._measured(full, kind, facts) for kind, facts in zip(self.kinds, packages, strict=True)]
        # One clip holds for all sites, since the manifest holds one clip and every update is bounded by it. The clip is
        # the largest of the medians: a clip too small for an emulator would cut most gradients of its sites, so that
        # their records would count less in the mean than the records of other sites. A clip too large for an emulator
        # costs its sites some more noise.
        return tuple(emulator for emulator, _ in pairs), max(clip for _, clip in pairs)

    def _measured(self, full: Any, kind: EmulatorVariant, facts: Manifest) -> tuple[Emulator, float]:
        folder, batch = self._folder(kind), self.config.training.physical_batch
        with self._named(kind, "gate: compare gradients through emulator and full model"):
            emulator = package_reader.load(
                folder,
                dtype=dtype_of(full),
                expected_digest=facts.digest(),
                device=device_of(full),
                hold=holding(STORED, self.spec),  # as most sites hold it, and so that a full model fits beside it
            )
            if every := self.config.emulator.refresh:
                Refreshable.of(emulator, facts, Frame.of(folder, facts)).check_any(every, facts)
            gate = PublicExamples(self.task, self.public.tune, gradients=GATE_EXAMPLES)
            cosine = gradient_cosine(full, emulator, self.spec, gate.losses, self.given)  # compares layouts too
            check_gate(cosine, kind.gate)
        with self._named(kind, "score the emulator on public records"):
            public = score(self.task, emulator, self.public.test, batch=batch)
        if fixed := self.config.privacy.max_grad_norm:
            return Emulator(kind.sites, facts, cosine, public), fixed
        with self._named(kind, "measure gradient norms on public records"):
            adapted = attach(emulator, self.spec, self.given)
            clip = _median_norm(self.task, adapted, self.public.tune, self.config.training)
        return Emulator(kind.sites, facts, cosine, public), clip

    def _folder(self, kind: EmulatorVariant) -> Path:
        return self.store.package_of("" if kind == self.kinds[0] else kind.sites[0])

    @contextmanager
    def _named(self, kind: EmulatorVariant, step: str) -> Iterator[None]:
        """Shows the step, and the sites where a job has several emulators; an error inside names these sites too."""
        whom = ", ".join(kind.sites)
        self.on_step(step if len(self.kinds) == 1 else f"{step}, for {whom}")
        try:
            yield
        except OffsiteError as error:
            if len(self.kinds) == 1:
                raise
            raise type(error)(f"emulator of sites={whom}: {error}") from error


def folders(store: Store, manifest: JobManifest) -> dict[str, Path]:
    """Returns the package folder of each emulator of a job by the emulator's SHA-256, the default first."""
    return {
        digest: store.package_of("" if digest == manifest.emulator else sites[0])
        for digest, sites in manifest.shipped().items()
    }


def reopened(store: Store, manifest: JobManifest, scores: tuple[EmulatorScores, ...]) -> tuple[Emulator, ...]:
    """Returns the emulators that `EmulatorFactory` built, from `Emulator.scores` and from their folders."""
    return tuple(
        Emulator(own.sites, package_reader.read_manifest(folder), own.gradient_cosine, own.public)
        for folder, own in zip(folders(store, manifest).values(), scores, strict=True)
    )


def _median_norm(task: Task, model: nn.Module, examples: Batch, training: TrainingConfig) -> float:
    """Returns the median norm of a record's contribution: of its gradient, or of its slopes in DP-ZO."""
    if training.directions:
        along = Directions(bytes(SEED_BYTES), training.directions, training.spacing)
        return median_slope(model, task.losses, (examples.select([row]) for row in range(len(examples))), along)
    batch = training.physical_batch
    engine = choose_engine(model, task.losses, examples.select([0, 1]))
    batches = [
        examples.select(list(range(start, min(start + batch, len(examples)))))
        for start in range(0, len(examples), batch)
    ]
    return median_norm(model, task.losses, batches, engine)
