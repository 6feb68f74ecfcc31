"""An emulator's package on paper: the blocks that a recipe leaves, and the bytes that would be shipped."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from offsite.coordinator.plan.model_outline import FLOAT32, Outline
from offsite.coordinator.plan.paper_block import PaperBlock, held_names, memory_bytes, rewritten, stored_bytes
from offsite.emulator.build.package_writer import embedding_storage, macs
from offsite.emulator.package.recipe import Step
from offsite.emulator.package.recipe_arguments import check_places, check_recipe, fraction
from offsite.emulator.structure.ends import PARALLEL
from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.structure.towers import signature

SKIPS = ("skip_uniform", "skip_importance", "skip_gradient")
CALIBRATED = (
    "refit",
    "patch",
    "narrow",
    "lowrank",
    "center",
    "distill",
    "prune",
    "prune_2_4",
    "gptq8",
    "gptq4",
    "gptq3",
)


@dataclass(frozen=True)
class Design:
    """One emulator.

    Attributes:
      first: number of blocks shipped verbatim at the input end.
      last: number of blocks shipped verbatim at the output end.
      shape: "sandwich" or "parallel".
      recipe: compressors of the middle, in order.
      embedding: storage of the embedding tables.
    """

    first: int = 2
    last: int = 2
    shape: str = "sandwich"
    recipe: tuple[str, ...] = ("int4:64",)
    embedding: str = "int8"

    def __str__(self) -> str:
        """Returns the design in a few words."""
        return f"{self.shape} {self.first}+{self.last}: {' '.join(self.recipe) or 'all verbatim'}"


@dataclass(frozen=True)
class PaperPackage:
    """A package on paper.

    Attributes:
      design: geometry and recipe.
      outline: the full model.
      slots: paths of the blocks that carry adapters.
      kept: blocks of the middle that run with weights of their own: each kind of block, with its number.
      shared: number of blocks that run on another block's weights.
      skipped: number of blocks that are left out.
      tables: storage of the embedding tables, by parameter name.
    """

    design: Design
    outline: Outline = field(repr=False)
    slots: tuple[str, ...]
    kept: tuple[tuple[PaperBlock, int], ...] = field(repr=False)
    shared: int
    skipped: int
    tables: Mapping[str, str] = field(repr=False)

    @property
    def itemsize(self) -> int:
        """Bytes of a number that is stored as it is."""
        return self.outline.stored.itemsize

    @property
    def running(self) -> int:
        """Number of blocks of the middle that run."""
        return self.shared + sum(count for _, count in self.kept)

    def outside(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Yields name, shape and storage of each parameter outside the middle."""
        geometry = Geometry(self.outline.tower, self.design.first, self.design.last, self.design.shape)
        middle = tuple(f"{path}." for path in geometry.middle(self.outline.model))
        for name, parameter in self.outline.model.named_parameters():
            if not name.startswith(middle):
                yield name, tuple(parameter.shape), self.tables.get(name, "")

    @property
    def bytes(self) -> int:
        """Bytes of all tensors as shipped."""
        outside = sum(stored_bytes(shape, how, self.itemsize) for _, shape, how in self.outside())
        return outside + sum(count * paper.stored(self.itemsize) for paper, count in self.kept)

    @property
    def widened(self) -> int:
        """Bytes of all weights in float32."""
        return self.outside_widened + sum(count * paper.widened for paper, count in self.kept)

    @property
    def outside_widened(self) -> int:
        """Bytes of all weights outside the middle in float32."""
        return FLOAT32 * sum(torch.Size(shape).numel() for _, shape, _ in self.outside())

    @property
    def in_memory(self) -> int:
        """Bytes of all weights at a site that holds dense layers and tables of words as they are stored."""
        held = held_names(self.outline.model)
        outside = sum(memory_bytes(shape, how, self.itemsize, held=name in held) for name, shape, how in self.outside())
        return outside + sum(count * paper.in_memory(self.itemsize) for paper, count in self.kept)

    @property
    def compute(self) -> float:
        """Multiply-adds of the running blocks of the middle over those of the full model's middle."""
        own = sum(count * macs(paper.block) for paper, count in self.kept)
        own += self.shared * max((macs(paper.block) for paper, _ in self.kept), default=0)
        model = self.outline.model
        whole = sum(
            macs(model.get_submodule(path))
            for path in self.outline.blocks[self.design.first : -self.design.last or None]
        )
        return own / whole if whole else 1.0

    @property
    def structure(self) -> tuple[object, ...]:
        """What decides the work of a step: the slots and the shapes of the blocks, but not their storage or number."""
        shapes = tuple(signature(paper.block) for paper, _ in self.kept[-1:])
        return (self.slots, shapes)

    @property
    def largest(self) -> int:
        """Number of entries of the largest tensor that is widened as a whole when the package is opened."""
        middle = max((p.numel() for paper, _ in self.kept for p in paper.block.parameters()), default=0)
        return max(middle, *(torch.Size(shape).numel() for _, shape, how in self.outside() if not how), 0)

    @property
    def calibrated(self) -> bool:
        """Whether the build runs public examples along."""
        return any(Step.parse(text).name in CALIBRATED for text in self.design.recipe)


def make_package(outline: Outline, design: Design) -> PaperPackage:
    """Returns the package of a design.

    Raises:
      ConfigError, UnknownName: the recipe or the geometry does not fit the model.
      UnsupportedModel: a compressor does not fit the blocks.
    """
    check_recipe(design.recipe, parallel=design.shape == PARALLEL)
    model = outline.model
    geometry = Geometry.of(model, design.first, design.last, design.shape)
    middle = list(geometry.middle(model))
    steps = [Step.parse(text) for text in design.recipe]
    for step in steps:
        check_places(step, range(design.first, design.first + len(middle)))
    kept, shared = _selected(outline, middle, steps)
    groups: dict[Any, tuple[PaperBlock, int]] = {}
    for path in kept:
        block, place = model.get_submodule(path), outline.blocks.index(path)
        own = tuple(step for step in steps if step.places is None or place in step.places)
        key = (signature(block), own)
        paper, count = groups.get(key) or (rewritten(block, own), 0)
        groups[key] = paper, count + 1
    skipped = len(middle) - len(kept) - shared
    tables = embedding_storage(model, design.embedding)
    return PaperPackage(design, outline, geometry.slots(model), tuple(groups.values()), shared, skipped, tables)


def _selected(outline: Outline, middle: list[str], steps: list[Step]) -> tuple[list[str], int]:
    """Returns the blocks that keep weights of their own, and the number of blocks that share another's."""
    kept, shared = list(middle), 0
    for step in steps:
        inside = [p for p in kept if step.places is None or outline.blocks.index(p) in step.places]
        if step.name == "skip":
            gone = len(inside)
        elif step.name in SKIPS:
            gone = min(len(inside), max(1, round(fraction(step.name, step.argument) * len(inside))))
        elif step.name == "share":
            gone = min(len(inside) - 1, max(1, round(fraction(step.name, step.argument) * len(inside))))
            shared += gone
        else:
            continue
        out = set(inside[len(inside) - gone :])
        kept = [path for path in kept if path not in out]
    return kept, shared
