"""Searches a recipe for given limits: each block becomes narrower, has fewer bits or goes, least damage first.

The measure is the slots' gradient through the emulator against the gradient through the full model, on public text.
Steps are ordered by damage for each unit saved, and a step is taken only if it was measured in the present state (the
principle is GradOT's).
"""

import copy
import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import nn

from offsite.emulator.build.cost import Cost, SizeLimits, dtype_of, full_macs, outside_cost, segment_cost
from offsite.emulator.build.ladder import LADDERS, SKIP, State
from offsite.emulator.calibration.draft import DraftSegment, SegmentContext, segment_contexts
from offsite.emulator.calibration.gradients import SlotGradients
from offsite.emulator.calibration.middle import Middle
from offsite.emulator.compressors import steps_of
from offsite.emulator.package.plan import Plan, Segment
from offsite.emulator.package.recipe import Step
from offsite.emulator.structure.identity_block import skipped
from offsite.errors import ConfigError

REFIT = "refit"
REPORT = 8  # steps of the descent between two lines of progress


@dataclass(frozen=True)
class Candidate:
    """An emulator that the search considered.

    Attributes:
      recipe: compressors of the emulator, in order.
      cost: cost of the whole emulator.
      flops: multiply-adds of the emulator's middle over the full model's.
      damage: 1 - cosine of the slots' gradients, with every block compressed by itself; 0 for the full model.
      fits: True if the emulator keeps to the limits on bytes, memory and compute.
    """

    recipe: tuple[str, ...]
    cost: Cost
    flops: float
    damage: float
    fits: bool


@dataclass(order=True)
class _NextStep:
    """The next step of one block.

    Attributes:
      rank: damage for each unit saved; the smallest rank is taken first.
      path: path of the block.
      start: state of the block before the step.
      end: state of the block after the step.
      after: damage with the step, as it was measured last.
      seen: number of steps that had been taken at that measurement; None before the first.
    """

    rank: float
    path: str
    start: State
    end: State
    after: float = field(default=0.0, compare=False)
    seen: int | None = field(default=None, compare=False)


@dataclass
class _Rung:
    """One block in one state: its cost and its module."""

    cost: Cost
    block: nn.Module


@dataclass
class Search:
    """One search for a recipe, with its state.

    Attributes:
      middle: the full model's middle, with public examples and losses.
      limits: limits on bytes, memory and compute.
      embedding: storage of the embedding tables.
      on_step: function that takes one line about each step, for a display.
    """

    middle: Middle
    limits: SizeLimits
    embedding: str
    on_step: Callable[[str], None] = lambda text: None
    _rungs: dict[str, dict[State, _Rung]] = field(default_factory=dict)
    _at: dict[str, State] = field(default_factory=dict)

    def run(self) -> list[Candidate]:
        """Returns the candidates in the order in which they were found; the last candidate fits.

        Raises:
          ConfigError: the limits cannot be met, however far each block is compressed.
        """
        self._ladder = LADDERS[self.middle.geometry.shape]
        self._outside = outside_cost(self.middle, self.embedding)
        self._full_macs = full_macs(self.middle)
        states = self._ladder.states()
        self.on_step(f"try {len(states)} actions on each of {len(self.middle.blocks)} blocks")
        self._prepare()
        self._check_possible()
        self._gradients = SlotGradients(self.middle)
        candidates = [self._uniform(state) for state in states]
        candidates.append(self._descend(self._start(states)))
        return candidates

    def _prepare(self) -> None:
        """Compresses each block in every state by itself, with the full model's inputs and outputs."""
        model, ladder = self.middle.source.model, self._ladder
        dtype = dtype_of(model)
        for context in segment_contexts(
            self.middle, Plan.whole(self.middle.blocks, apart=self.middle.apart), public=True
        ):
            path = str(context.draft.segment.head)
            rungs = self._rungs[path] = {}
            for i, width in enumerate(ladder.widths):
                if width == (SKIP,):
                    if path in self.middle.skippable:
                        form = self.middle.stream.forms[path]
                        rungs[i, 0] = _Rung(Cost(), skipped(model.get_submodule(path), form))
                    continue
                narrowed = _copy(context, width)
                for j, storage in enumerate(ladder.storages):
                    draft = _copy(narrowed, storage).draft
                    rungs[i, j] = _Rung(segment_cost(draft), draft.blocks[path].to(dtype))

    def _start(self, states: list[State]) -> dict[str, State]:
        """Returns the uniform state that exceeds the limits least.

        From this state a few steps are left; from the top of the ladder there are fifty, each with its measurements.
        On a model of 30 blocks a descent from the top, with measurements up to eight steps old, ended far below the
        uniform states.
        """
        near: tuple[float, dict[str, State]] = (math.inf, dict.fromkeys(self._rungs, (0, 0)))
        for state in states:
            self._spread(state)
            cost, excess = self._cost(), self._excess()
            over = sum(value / getattr(cost, name) for name, value in excess.items())
            if excess and over < near[0]:
                near = over, self._at
        return near[1]

    def _descend(self, start: dict[str, State]) -> Candidate:
        """Takes single steps until every limit is kept."""
        self._at = dict(start)
        damage = self._damage()
        queue: list[_NextStep] = []
        for path in self._rungs:
            self._push_steps(queue, path)
        taken = 0
        while queue and (excess := self._excess()):
            step = heapq.heappop(queue)
            saved = self._saved(step, excess)
            if step.start != self._at[step.path] or saved <= 0:
                continue
            if step.seen != taken:
                after = self._damage({step.path: self._rungs[step.path][step.end].block})
                rank = max(after - damage, 0.0) / saved
                heapq.heappush(queue, replace(step, rank=rank, after=after, seen=taken))
                continue
            self._at[step.path] = step.end
            self._push_steps(queue, step.path)
            taken += 1
            damage = step.after
            if taken % REPORT == 0:
                self.on_step(f"{taken} steps, cosine {1 - damage:.3f}, {self._cost().bytes / 1e6:.0f} MB")
        return self._candidate(damage)

    def _push_steps(self, queue: list[_NextStep], path: str) -> None:
        """Puts the next steps of a block into the queue; a step is measured when it comes to the head."""
        for state in self._ladder.below(self._at[path]):
            if state in self._rungs[path]:
                heapq.heappush(queue, _NextStep(0.0, path, self._at[path], state))

    def _uniform(self, state: State) -> Candidate:
        """Returns the candidate of `_spread`, for the report's table."""
        self._spread(state)
        return self._candidate(self._damage())

    def _spread(self, state: State) -> None:
        """Puts each block into one state; a block without that state gets its cheapest."""
        self._at = {path: state if state in rungs else max(rungs) for path, rungs in self._rungs.items()}

    def _damage(self, others: Mapping[str, nn.Module] = MappingProxyType({})) -> float:
        """Returns the damage of the present state, with other modules in the places of some blocks."""
        blocks = {path: rungs[self._at[path]].block for path, rungs in self._rungs.items()}
        return self._gradients.damage_of({**blocks, **others})

    def _saved(self, step: _NextStep, excess: dict[str, float]) -> float:
        """Returns the share of the excess that a step saves, summed over the limits; 0 for a step that saves none."""
        saving = self._rungs[step.path][step.start].cost - self._rungs[step.path][step.end].cost
        return sum(min(getattr(saving, name) / over, 1.0) for name, over in excess.items())

    def _cost(self) -> Cost:
        return sum((rungs[self._at[path]].cost for path, rungs in self._rungs.items()), self._outside)

    def _excess(self) -> dict[str, float]:
        return self.limits.excess(self._cost(), self._full_macs)

    def _candidate(self, damage: float) -> Candidate:
        cost = self._cost()
        flops = cost.macs / self._full_macs if self._full_macs else 1.0
        return Candidate(self._recipe(), cost, flops, damage, not self._excess())

    def _recipe(self) -> tuple[str, ...]:
        """Returns the actions of all blocks as one recipe: selecting steps first, then rewriting steps."""
        places: dict[str, set[int]] = {}
        for path, at in self._at.items():
            for text in self._ladder.actions(at):
                places.setdefault(text, set()).add(self.middle.place(path))
        if SKIP in places:
            # Blocks that stay do the work of the left-out blocks, as far as they can.
            places[REFIT] = {place for text, some in places.items() if text != SKIP for place in some}
        steps = [Step.parse(text) for text in sorted(places, key=_rank) if places[text]]
        return tuple(str(Step(s.name, s.argument, frozenset(places[str(s)]))) for s in steps)

    def _check_possible(self) -> None:
        self._at = {path: max(rungs) for path, rungs in self._rungs.items()}
        if excess := self._excess():
            cost = self._cost()
            raise ConfigError(
                f"max_{next(iter(excess))}: the smallest emulator has {cost.bytes / 1e6:.1f} MB, "
                f"{cost.parameters / 1e6:.1f} MB in memory and {cost.macs / max(self._full_macs, 1):.2f} of the "
                "middle's compute; raise the limit, or ship fewer blocks verbatim"
            )


def _rank(text: str) -> tuple[int, str]:
    """Returns the place of a step in a recipe: selection, change of a block, fit of a block, rounding."""
    if text in (SKIP, REFIT):
        return (0 if text == SKIP else 2), text
    return (3 if text.startswith(("gptq", "int")) else 1), text


def _copy(context: SegmentContext, action: tuple[str, ...]) -> SegmentContext:
    """Returns a copy of one block's segment, changed by the compressors of an action."""
    old = context.draft
    blocks = {path: copy.deepcopy(block) for path, block in old.blocks.items()}
    draft = DraftSegment(
        Segment(old.segment.head, (), None), blocks, dict(old.storage), dict(old.pieces), set(old.changed)
    )
    trial = SegmentContext(context.middle, draft, context.inputs, context.target)
    for step, compressor in steps_of(action):
        if compressor.rewrite is None:
            raise ConfigError(f"action={step}: a ladder may hold skip and rewriting compressors only; correct it")
        compressor.rewrite(trial, step.argument)
    return trial
