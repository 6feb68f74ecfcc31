"""The emulators of one job, the same for all sites or not: built, gated, scored and measured one after the other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offsite.adapter.auxiliary import AuxiliaryTensors
from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.coordinator.config.emulator_table import EmulatorVariant
from offsite.coordinator.config.federation_file import FedConfig, TrainingConfig
from offsite.coordinator.job.evaluate import score
from offsite.coordinator.job.job_facts import EmulatorScores
from offsite.coordinator.job.public_records import GATE_EXAMPLES, PublicRecords
from offsite.coordinator.job.score import Score
from offsite.coordinator.job.store import Store
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.evaluation.fidelity import check_gate, gradient_cosine
from offsite.emulator.package import package_reader
from offsite.emulator.package.manifest import Manifest
from offsite.emulator.runtime.refresh_state import Frame, Refreshable
from offsite.emulator.structure.geometry import Geometry
from offsite.errors import OffsiteError
from offsite.privacy.clipping_bound import median_norm
from offsite.privacy.probe import choose_engine
from offsite.privacy.zero_order import SEED_BYTES, Directions, median_slope
from offsite.protos.job_manifest import JobManifest
from offsite.task.spec import Batch, Task


@dataclass(frozen=True)
class Emulator:
    """One emulator of a job as it was made.

    Attributes:
      sites: that get it, sorted.
      facts: manifest of its package.
      cosine: gradient cosine of the gate.
      public: score on public records before any training.
    """

    sites: tuple[str, ...]
    facts: Manifest
    cosine: float
    public: Score

    def scores(self) -> EmulatorScores:
        """Returns what `reopened` needs beside the package."""
        return EmulatorScores(self.sites, self.cosine, self.public)


@dataclass(frozen=True)
class EmulatorFactory:
    """What the emulators of a job have in common; geometry and adapter are, so that their updates can be added.

    Attributes:
      config: the federation file.
      kinds: the emulators to make, the default first.
      task: of the job.
      public: public examples.
      geometry: slots and middle.
      spec: of the adapter.
      store: run folder.
      on_step: told what is being done.
      given: what the adapter needs and does not train; the same in every package.
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

    def build(self, full: Any) -> list[Manifest]:
        """Writes the packages into the run folder and returns their manifests, in order.

        Args:
          full: the model, in the dtype in which its weights are stored.

        Raises:
          OffsiteError: see `emulator.package.build`; where there are several, it names the sites.
        """
        self.store.clear_packages()
        fitted = PublicExamples(self.task, self.public.calibration, self.config.training.physical_batch)
        compared = PublicExamples(self.task, self.public.tune, gradients=GATE_EXAMPLES)
        found = []
        for kind in self.kinds:
            with self._named(kind, "build the emulator package"):
                facts = write_package(
                    full,
                    EmulatorDesign(self.geometry, kind.compress, kind.embedding),
                    Calibration(fitted.run, compared.losses),
                    self._folder(kind),
                    tokenizer=Path(self.config.model.path),
                    auxiliary=self.given,
                )
            found.append(facts)
        return found

    def measure(self, full: Any, packages: list[Manifest]) -> tuple[tuple[Emulator, ...], float]:
        """Gates and scores every emulator; one is in memory at a time.

        Args:
          full: the model as float32, without adapter, and left so.
          packages: manifests of the emulators, in order.

        Returns:
          The emulators, and the clip of one record's gradient.

        Raises:
          ConfigError: one is below its gate; where there are several, it names the sites.
          DigestMismatch: one takes another adapter than the full model.
        """
        pairs = [self._measured(full, kind, facts) for kind, facts in zip(self.kinds, packages, strict=True)]
        # One clip holds for all, since it stands in the manifest and bounds every update. It is the largest of the
        # medians: one that is too small for an emulator would cut most gradients of its sites, so that their records
        # count less in the mean than those of the others; one that is too large costs the others some more noise.
        return tuple(emulator for emulator, _ in pairs), max(clip for _, clip in pairs)

    def _measured(self, full: Any, kind: EmulatorVariant, facts: Manifest) -> tuple[Emulator, float]:
        folder, batch = self._folder(kind), self.config.training.physical_batch
        with self._named(kind, "gate: compare gradients through emulator and full model"):
            emulator = package_reader.load(folder, dtype=torch.float32, expected_digest=facts.digest())
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
        """Says what is being done, and for whom where not all sites get the same."""
        whom = ", ".join(kind.sites)
        self.on_step(step if len(self.kinds) == 1 else f"{step}, for {whom}")
        try:
            yield
        except OffsiteError as error:
            if len(self.kinds) == 1:
                raise
            raise type(error)(f"emulator of sites={whom}: {error}") from error


def folders(store: Store, manifest: JobManifest) -> dict[str, Path]:
    """Returns the package folder of each emulator of a job, by its SHA-256; the default's first."""
    return {
        digest: store.package_of("" if digest == manifest.emulator else sites[0])
        for digest, sites in manifest.shipped().items()
    }


def reopened(store: Store, manifest: JobManifest, scores: tuple[EmulatorScores, ...]) -> tuple[Emulator, ...]:
    """Returns the emulators that `EmulatorFactory` made, from `Emulator.scores` and what lies in their folders now."""
    return tuple(
        Emulator(own.sites, package_reader.read_manifest(folder), own.gradient_cosine, own.public)
        for folder, own in zip(folders(store, manifest).values(), scores, strict=True)
    )


def _median_norm(task: Task, model: nn.Module, examples: Batch, training: TrainingConfig) -> float:
    """Returns the median of what a record's contribution is clipped by: its gradient's norm, or that of its slopes."""
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
