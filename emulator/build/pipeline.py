"""From limits to a package: searches candidates, builds the best, and refuses a package that fails the gate."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from offsite.adapter.methods import frozen_count, needs_public_data
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.build.cost import Cost, SizeLimits
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.build.search import Candidate, Search
from offsite.emulator.calibration.middle import Calibration, Middle
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.calibration.source import Source
from offsite.emulator.evaluation.fidelity import check_gate, gradient_cosine
from offsite.emulator.evaluation.leak import similarity
from offsite.emulator.evaluation.rehearse import Lesson, Reference, Rehearsal, Text, reference, rehearse
from offsite.emulator.package import package_reader
from offsite.emulator.package.manifest import Manifest
from offsite.emulator.structure.ends import PARALLEL, SANDWICH
from offsite.emulator.structure.geometry import Geometry
from offsite.errors import ConfigError
from offsite.task.device import device_of

AUTO = "auto"
RELEARN = (10_000,)
SKETCH, SKETCH_GRADIENTS = 32, 4


@dataclass(frozen=True)
class Order:
    """The wanted emulator.

    Attributes:
      first: number of blocks shipped verbatim at the input end.
      last: number of blocks shipped verbatim at the output end.
      shape: "sandwich", "parallel", or "auto" for the shape whose gradients turn less.
      recipe: compressors of the middle, in order; () lets the limits decide.
      limits: largest cost and largest leak.
      embedding: storage of the embedding tables.
      adapter: spec of the adapter that will be trained; the build fills in its slots.
      gate: smallest cosine of the adapter's gradients, in -1..1.
      rehearse: True to rehearse the exchange on public records; a limit on the leak always does.
      relearn: numbers of tokens on which an attacker tunes all weights in a rehearsal.
    """

    first: int = 2
    last: int = 2
    shape: str = SANDWICH
    recipe: tuple[str, ...] = ()
    limits: SizeLimits = field(default_factory=SizeLimits)
    embedding: str = "int8"
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    gate: float = 0.6
    rehearse: bool = False
    relearn: tuple[int, ...] = RELEARN


@dataclass(frozen=True)
class Public:
    """The coordinator's own text, by purpose; no example serves two purposes.

    Attributes:
      calibration: examples that compressors are fitted to.
      gate: examples on which gradients are compared; on the text of the fits they would look better than they are.
      text: examples for rehearsals.
    """

    calibration: PublicExamples
    gate: PublicExamples
    text: Text

    def functions(self) -> Calibration:
        """Returns the functions that compressors call."""
        return Calibration(self.calibration.run, self.gate.losses)

    def sketch(self) -> Calibration:
        """Returns the functions that a search calls hundreds of times: a few of the examples suffice for a ranking."""
        few = self.calibration.examples.select(range(min(SKETCH, len(self.calibration.examples))))
        return Calibration(
            replace(self.calibration, examples=few).run, replace(self.gate, gradients=SKETCH_GRADIENTS).losses
        )


@dataclass(frozen=True)
class Built:
    """A package that passed the gate, and the facts measured on the way.

    Attributes:
      manifest: the package's manifest.
      candidates: candidates of the search; () if the order had a recipe.
      cosine: cosine of the adapter's gradients through emulator and full model, in -1..1.
      losses: public loss of the full model ("full") and of the emulator ("emulator"), nats per token.
      similarity: cosine of each block's outputs in the emulator and in the full model, by path.
      rehearsal: rehearsal on public records; None if the order asked for none.
    """

    manifest: Manifest
    candidates: tuple[Candidate, ...]
    cosine: float
    losses: dict[str, float]
    similarity: dict[str, float]
    rehearsal: Rehearsal | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form of the report."""
        facts = self.manifest
        return {
            "emulator": facts.digest(),
            "recipe": list(facts.recipe),
            "embedding": facts.embedding,
            "shape": facts.geometry.shape,
            "shipped_bytes": facts.shipped_bytes,
            "full_bytes": facts.full_bytes,
            "middle_ratio": facts.middle_ratio,
            "compute_ratio": facts.compute_ratio,
            "verbatim": facts.verbatim,
            "gradient_cosine": self.cosine,
            "public_loss": self.losses,
            "similarity": self.similarity,
            "rehearsal": self.rehearsal.to_dict() if self.rehearsal else None,
            "candidates": [
                {
                    "recipe": list(candidate.recipe),
                    "bytes": candidate.cost.bytes,
                    "flops": candidate.flops,
                    "cosine": 1 - candidate.damage,
                    "fits": candidate.fits,
                }
                for candidate in self.candidates
            ],
        }


@dataclass
class BuildPipeline:
    """Builds the emulator of one model for one order.

    Attributes:
      source: the full model.
      order: the wanted emulator.
      public: the coordinator's own text.
      tokenizer: folder with the tokenizer files of the package; None for a package without a tokenizer.
      on_step: function that takes one line about each step, for a display.
    """

    source: Source
    order: Order
    public: Public
    tokenizer: Path | None
    on_step: Callable[[str], None] = lambda text: None
    _reference: Reference | None = None

    def build(self, directory: Path) -> Built:
        """Writes the package and returns its report; a refused package leaves no folder behind.

        Raises:
          ConfigError: the limits cannot be met, the gradients point elsewhere, or every candidate gives too much away.
          OffsiteError: the package cannot be written, as for `write_package`.
        """
        if frozen_count(self.order.adapter) or needs_public_data(self.order.adapter):
            raise ConfigError(
                f"method={self.order.adapter.method!r}: needs auxiliary tensors, which only a job has; name the "
                "method in a federation file, or build for another method"
            )
        refusal: ConfigError | None = None
        for geometry, recipe, candidates in self._choices():
            try:
                return self._try(geometry, recipe, tuple(candidates), directory)
            except _TooLeaky as error:
                refusal = error
                self.on_step(str(error))
        raise ConfigError(str(refusal))

    def _choices(self) -> Iterator[tuple[Geometry, tuple[str, ...], list[Candidate]]]:
        """Yields geometry, recipe and candidates to build, best first; several only if the leak is limited."""
        order = self.order
        shapes = (SANDWICH, PARALLEL) if order.shape == AUTO else (order.shape,)
        geometries = [Geometry.of(self.source.model, order.first, order.last, shape) for shape in shapes]
        if order.recipe:
            yield geometries[0], order.recipe, []
            return
        pairs: list[tuple[Geometry, Candidate]] = []
        for geometry in geometries:
            self.on_step(f"search a {geometry.shape} emulator")
            middle = Middle(self.source, geometry, self.public.sketch())
            search = Search(middle, order.limits, order.embedding, self.on_step)
            pairs += [(geometry, candidate) for candidate in search.run()]
        considered = [candidate for _, candidate in pairs]
        fitting = sorted((pair for pair in pairs if pair[1].fits), key=lambda pair: pair[1].damage)
        for geometry, candidate in fitting if order.limits.leak is not None else fitting[:1]:
            yield geometry, candidate.recipe, considered

    def _try(
        self, geometry: Geometry, recipe: tuple[str, ...], candidates: tuple[Candidate, ...], directory: Path
    ) -> Built:
        order, public = self.order, self.public
        self.on_step(f"build {' '.join(recipe) or 'the whole model'}")
        manifest = write_package(
            self.source,
            EmulatorDesign(geometry, recipe, order.embedding),
            public.functions(),
            directory,
            tokenizer=self.tokenizer,
        )
        try:
            return self._judge(manifest, geometry, candidates, directory)
        except BaseException:
            shutil.rmtree(directory)
            raise

    def _judge(
        self, manifest: Manifest, geometry: Geometry, candidates: tuple[Candidate, ...], directory: Path
    ) -> Built:
        order, model = self.order, self.source.model
        _check_limits(manifest, order.limits)
        emulator = package_reader.load(directory, dtype=torch.float32, expected_digest=manifest.digest())
        emulator = emulator.to(device_of(model))
        spec = replace(order.adapter, slots=geometry.slots(model))
        self.source.keep(spec.slots)
        self.on_step("gate: compare gradients through emulator and full model")
        with self.source.passing():
            cosine = gradient_cosine(model, emulator, spec, self.public.gate.losses)
            check_gate(cosine, order.gate)
            losses = {"full": self.public.text.test.loss(model), "emulator": self.public.text.test.loss(emulator)}
        rehearsal = self._rehearse(emulator, spec)
        middle = Middle(self.source, geometry, self.public.functions())
        return Built(manifest, candidates, cosine, losses, similarity(middle, emulator), rehearsal)

    def _rehearse(self, emulator: torch.nn.Module, spec: AdapterSpec) -> Rehearsal | None:
        order = self.order
        if not order.rehearse and order.limits.leak is None:
            return None
        lesson, model = Lesson(spec), self.source.model
        with self.source.passing():
            self.on_step("rehearse: train the adapter on public records, in the full model and on the emulator")
            if self._reference is None:
                self._reference = reference(model, lesson, self.public.text)
            rehearsal = rehearse(model, emulator, lesson, self.public.text, self._reference, relearn=order.relearn)
        if order.limits.leak is not None and rehearsal.worst_leak > order.limits.leak:
            raise _TooLeaky(
                f"max_leak={order.limits.leak:g}: this emulator gives away {rehearsal.worst_leak:.2f} of what the "
                "slots gain; allow more, or ship less: a lower max_flops or max_bytes"
            )
        return rehearsal


class _TooLeaky(ConfigError):
    """A candidate gives too much away; the next candidate may give less."""


def _check_limits(manifest: Manifest, limits: SizeLimits) -> None:
    """Refuses a finished package that exceeds its limits; the search only estimated them."""
    cost = Cost(manifest.payload_bytes, manifest.middle_macs, 0)
    if excess := replace(limits, memory=None).excess(cost, manifest.middle_full_macs):
        name = next(iter(excess))
        raise ConfigError(
            f"max_{name}: the package exceeds it by {excess[name]:.3g}; raise the limit or change the recipe"
        )
