"""A recipe for given limits: each block becomes narrower, is stored in fewer bits or goes, least damage first.

The measure is the slots' gradient through the emulator against the one through the full model, on public text; the
order is by what is lost for what is saved, and a step is taken only as it was measured in the present state (the
principle is GradOT's).
"""

import copy
import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import nn

from offsite.emulator.build.cost import Cost, SizeLimits, dtype_of, full_macs, outside_cost, span_cost
from offsite.emulator.calibration.draft import DraftSegment, Station, spans
from offsite.emulator.calibration.gradients import SlotGradients
from offsite.emulator.calibration.middle import Middle
from offsite.emulator.compressors import steps_of
from offsite.emulator.package.plan import Plan, Segment
from offsite.emulator.package.recipe import Step
from offsite.emulator.structure.geometry import PARALLEL, SANDWICH
from offsite.emulator.structure.identity_block import skipped
from offsite.errors import ConfigError

SKIP, REFIT = "skip", "refit"


@dataclass(frozen=True)
class Ladder:
    """What may be done to one block: a width and a storage, each from dear to cheap; left out, it needs no storage.

    Widths and bits are those between which measurements on real models found a difference. With a third of the channels
    a block of the usual proportions (attention a quarter of its work) needs just under half of the compute.
    """

    widths: tuple[tuple[str, ...], ...]
    storages: tuple[tuple[str, ...], ...]

    def states(self) -> list["State"]:
        """Returns every state, the dearest first."""
        return [(i, j) for i, width in enumerate(self.widths) for j in range(self._storages(width))]

    def below(self, state: "State") -> list["State"]:
        """Returns the states one step down."""
        i, j = state
        narrower = [(i + 1, min(j, self._storages(self.widths[i + 1]) - 1))] if i + 1 < len(self.widths) else []
        return narrower + ([(i, j + 1)] if j + 1 < self._storages(self.widths[i]) else [])

    def actions(self, state: "State") -> tuple[str, ...]:
        """Returns the compressors of a state, in order."""
        width = self.widths[state[0]]
        return width if width == (SKIP,) else (*width, *self.storages[state[1]])

    def _storages(self, width: tuple[str, ...]) -> int:
        return 1 if width == (SKIP,) else len(self.storages)


State = tuple[int, int]
LADDERS = {
    SANDWICH: Ladder(
        widths=((), ("narrow:0.5",), ("narrow:0.33",), ("narrow:0.2",), (SKIP,)),
        storages=(("int8:128",), ("gptq4:64",)),
    ),
    PARALLEL: Ladder(
        widths=((),), storages=(("int8:128",), ("gptq4:32/6",), ("gptq4:128",), ("gptq3:32/6",), ("gptq3:128",))
    ),
}
REPORT = 8


@dataclass(frozen=True)
class Candidate:
    """An emulator that was considered.

    Attributes:
      recipe: how it is made.
      cost: of the whole emulator.
      flops: multiply-adds of its middle over the full model's.
      damage: 1 - cosine of the slots' gradients, with every block compressed by itself; 0 for the full model.
      fits: whether it keeps to the limits on bytes, memory and compute.
    """

    recipe: tuple[str, ...]
    cost: Cost
    flops: float
    damage: float
    fits: bool


@dataclass(order=True)
class _Offer:
    """The next step of one block.

    Attributes:
      rank: damage for what is saved; the least is taken first.
      path: of the block.
      start, end: before the step and after it.
      after: the damage with it, as it was measured last.
      seen: how many steps had been taken then; None where it was not.
    """

    rank: float
    path: str
    start: State
    end: State
    after: float = field(default=0.0, compare=False)
    seen: int | None = field(default=None, compare=False)


@dataclass
class _Rung:
    """One block in one state."""

    cost: Cost
    block: nn.Module


@dataclass
class Search:
    """The state of one search.

    Attributes:
      middle: of the model, with public examples and losses.
      limits: on bytes, memory and compute.
      embedding: storage of the embedding tables.
      on_step: told what is being done.
    """

    middle: Middle
    limits: SizeLimits
    embedding: str
    on_step: Callable[[str], None] = lambda text: None
    _rungs: dict[str, dict[State, _Rung]] = field(default_factory=dict)
    _at: dict[str, State] = field(default_factory=dict)

    def run(self) -> list[Candidate]:
        """Returns the candidates in the order in which they were found; the last one fits.

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
        found = [self._uniform(state) for state in states]
        found.append(self._descend(self._start(states)))
        return found

    def _prepare(self) -> None:
        """Compresses each block by itself, as if what reaches it and what it must give were the full model's."""
        model, ladder = self.middle.source.model, self._ladder
        dtype = dtype_of(model)
        for station in spans(self.middle, Plan.whole(self.middle.blocks, apart=self.middle.apart), public=True):
            path = str(station.span.stretch.head)
            rungs = self._rungs[path] = {}
            for i, width in enumerate(ladder.widths):
                if width == (SKIP,):
                    if path in self.middle.skippable:
                        form = self.middle.stream.forms[path]
                        rungs[i, 0] = _Rung(Cost(), skipped(model.get_submodule(path), form))
                    continue
                narrowed = _copy(station, width)
                for j, storage in enumerate(ladder.storages):
                    span = _copy(narrowed, storage).span
                    rungs[i, j] = _Rung(span_cost(span), span.blocks[path].to(dtype))

    def _start(self, states: list[State]) -> dict[str, State]:
        """Returns the uniform state, brought as near to the limits as one that does not keep them can be.

        From there a few steps are left, where there are fifty from the top of the ladder, each with its measurements.
        On a model of 30 blocks that descent, with prices up to eight steps old, ended far below the uniform states.
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
        queue: list[_Offer] = []
        for path in self._rungs:
            self._offer(queue, path)
        taken = 0
        while queue and (excess := self._excess()):
            offer = heapq.heappop(queue)
            saved = self._saved(offer, excess)
            if offer.start != self._at[offer.path] or saved <= 0:
                continue
            if offer.seen != taken:
                after = self._damage({offer.path: self._rungs[offer.path][offer.end].block})
                rank = max(after - damage, 0.0) / saved
                heapq.heappush(queue, replace(offer, rank=rank, after=after, seen=taken))
                continue
            self._at[offer.path] = offer.end
            self._offer(queue, offer.path)
            taken += 1
            damage = offer.after
            if taken % REPORT == 0:
                self.on_step(f"{taken} steps, cosine {1 - damage:.3f}, {self._cost().bytes / 1e6:.0f} MB")
        return self._candidate(damage)

    def _offer(self, queue: list[_Offer], path: str) -> None:
        """Puts the next steps of a block into the queue, to be measured when they come to its head."""
        for state in self._ladder.below(self._at[path]):
            if state in self._rungs[path]:
                heapq.heappush(queue, _Offer(0.0, path, self._at[path], state))

    def _uniform(self, state: State) -> Candidate:
        """Returns the candidate in which each block is in one state, as far as it can be, for the table."""
        self._spread(state)
        return self._candidate(self._damage())

    def _spread(self, state: State) -> None:
        """Puts each block into one state, as far as it can be."""
        self._at = {path: state if state in rungs else max(rungs) for path, rungs in self._rungs.items()}

    def _damage(self, others: Mapping[str, nn.Module] = MappingProxyType({})) -> float:
        """Returns the damage of the present state, with others in the place of some blocks."""
        blocks = {path: rungs[self._at[path]].block for path, rungs in self._rungs.items()}
        return self._gradients.damage_of({**blocks, **others})

    def _saved(self, offer: _Offer, excess: dict[str, float]) -> float:
        """Returns how much of what is too much a step saves, summed over the limits; 0 for a step that is no help."""
        saving = self._rungs[offer.path][offer.start].cost - self._rungs[offer.path][offer.end].cost
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
        """Returns the actions of all blocks as one recipe: what selects first, then what rewrites."""
        places: dict[str, set[int]] = {}
        for path, at in self._at.items():
            for text in self._ladder.actions(at):
                places.setdefault(text, set()).add(self.middle.place(path))
        if SKIP in places:
            # What stays does the work of what is gone, as far as it can.
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
    """Returns the order of steps: what selects, what changes a block, what fits it again, what rounds it."""
    if text in (SKIP, REFIT):
        return (0 if text == SKIP else 2), text
    return (3 if text.startswith(("gptq", "int")) else 1), text


def _copy(station: Station, action: tuple[str, ...]) -> Station:
    """Returns the stretch of one block under an action, made from a copy."""
    old = station.span
    blocks = {path: copy.deepcopy(block) for path, block in old.blocks.items()}
    span = DraftSegment(
        Segment(old.stretch.head, (), None), blocks, dict(old.storage), dict(old.pieces), set(old.changed)
    )
    trial = Station(station.middle, span, station.inputs, station.target)
    for step, compressor in steps_of(action):
        if compressor.rewrite is None:
            raise ConfigError(f"action={step}: a ladder may hold skip and rewriting compressors only; correct it")
        compressor.rewrite(trial, step.argument)
    return trial
