"""The one table of compressors, and the functions that apply a recipe."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from offsite.emulator.calibration.draft import DraftSegment, SegmentContext, segment_contexts
from offsite.emulator.calibration.middle import Middle
from offsite.emulator.compressors.center import center
from offsite.emulator.compressors.distill import distill
from offsite.emulator.compressors.gptq import gptq
from offsite.emulator.compressors.integers import rounded
from offsite.emulator.compressors.lowrank import lowrank
from offsite.emulator.compressors.narrow import narrow
from offsite.emulator.compressors.patch import patch
from offsite.emulator.compressors.prune import prune, prune_2_4
from offsite.emulator.compressors.refit import refit
from offsite.emulator.compressors.share import share
from offsite.emulator.compressors.skips import skip, skip_gradient, skip_importance, skip_uniform
from offsite.emulator.package.plan import Plan
from offsite.emulator.package.recipe import Step
from offsite.emulator.package.recipe_arguments import check_places
from offsite.errors import lookup


@dataclass(frozen=True)
class Compressor:
    """One way to make the middle smaller; either `select` or `rewrite` is set.

    Attributes:
      select: function that returns the plan with fewer blocks of their own; all selecting steps run first, in the
        recipe's order.
      rewrite: function that changes one segment, in the recipe's order, once the segment's inputs in the emulator are
        known.
      public: True if the compressor needs public examples.
    """

    select: Callable[[Plan, Middle, Step], Plan] | None = None
    rewrite: Callable[[SegmentContext, str], None] | None = None
    public: bool = True


COMPRESSORS: dict[str, Compressor] = {
    "skip": Compressor(select=skip),
    "skip_uniform": Compressor(select=skip_uniform),
    "skip_importance": Compressor(select=skip_importance),
    "skip_gradient": Compressor(select=skip_gradient),
    "share": Compressor(select=share),
    "refit": Compressor(rewrite=refit),
    "patch": Compressor(rewrite=patch),
    "narrow": Compressor(rewrite=narrow),
    "lowrank": Compressor(rewrite=lowrank),
    "center": Compressor(rewrite=center),
    "distill": Compressor(rewrite=distill),
    "prune": Compressor(rewrite=prune),
    "prune_2_4": Compressor(rewrite=prune_2_4),
    "int8": Compressor(rewrite=partial(rounded, 8), public=False),
    "int4": Compressor(rewrite=partial(rounded, 4), public=False),
    "int3": Compressor(rewrite=partial(rounded, 3), public=False),
    "gptq8": Compressor(rewrite=partial(gptq, 8)),
    "gptq4": Compressor(rewrite=partial(gptq, 4)),
    "gptq3": Compressor(rewrite=partial(gptq, 3)),
}


def steps_of(recipe: tuple[str, ...]) -> list[tuple[Step, Compressor]]:
    """Returns the steps of a recipe, each with its compressor.

    Raises:
      UnknownName: a compressor is not in `COMPRESSORS`.
      ConfigError: a step's places cannot be read.
    """
    steps = [Step.parse(text) for text in recipe]
    return [(step, lookup(COMPRESSORS, step.name, "compressor")) for step in steps]


def make_plan(middle: Middle, recipe: tuple[str, ...]) -> Plan:
    """Returns the plan of a recipe: which blocks stay, are left out, or share weights; the empty recipe keeps all.

    Raises:
      UnknownName: a compressor is not in `COMPRESSORS`.
      ConfigError: an argument is out of range, or a place is not in the middle.
    """
    plan = Plan.whole(middle.blocks, apart=middle.apart)
    known = {middle.place(path) for path in middle.blocks}
    for step, compressor in steps_of(recipe):
        check_places(step, known)
        if compressor.select is not None:
            plan = compressor.select(plan, middle, step)
    return plan


def apply(middle: Middle, recipe: tuple[str, ...], plan: Plan) -> Iterator[DraftSegment]:
    """Yields the segments of the middle in order, compressed.

    Raises:
      ConfigError: an argument is out of range.
      UnsupportedModel: a compressor does not fit the model's structure.
    """
    steps = steps_of(recipe)
    public = any(compressor.public and compressor.rewrite for _, compressor in steps)
    for context in segment_contexts(middle, plan, public=public):
        places = {middle.place(path) for path in context.draft.segment.paths}
        for step, compressor in steps:
            if compressor.rewrite is not None and (step.places is None or step.places & places):
                compressor.rewrite(context, step.argument)
        yield context.draft
