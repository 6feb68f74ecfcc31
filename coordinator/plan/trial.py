"""Trials on the meta device: the very step, vetting and scores of a model with few blocks, counted and scaled up.

Blocks are alike, so the work of a model grows by the same amount with each further block of one kind. Two runs, with
one and with two blocks in the middle, tell that amount; the rest is the ends, the embedding and the head.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.coordinator.plan.codes_on_meta import keep_codes, with_codes
from offsite.coordinator.plan.meta_run import META, MetaRun, Work
from offsite.coordinator.plan.model_outline import Outline
from offsite.coordinator.plan.paper_package import Design, PaperPackage
from offsite.emulator.structure.ends import PARALLEL
from offsite.emulator.vetting.random_inputs import EXAMPLES, LENGTH
from offsite.errors import PrivacyRefusal
from offsite.privacy.engines import ENGINES
from offsite.privacy.independence import routed
from offsite.privacy.probe import ALONE

WIDENING = 17  # bytes that the widening of one stored weight reads and writes; a step widens each weight twice
DECODED = 6  # bytes for each entry of the tensor that is widened: codes, float32 numbers, a mask of finite ones
FEW, MORE = 1, 2  # blocks of the middle in the two runs


@dataclass(frozen=True)
class Batches:
    """The sizes of the examples.

    Attributes:
      length: number of tokens of an example.
      physical: number of examples in one pass.
    """

    length: int = 128
    physical: int = 8


@dataclass(frozen=True)
class Trials:
    """Work of one model, and what its adapter sends.

    Attributes:
      step: forward, backward and clipped sum of one physical batch; without the weights.
      forward: losses of one physical batch without gradients.
      vetting: a pass of the vetting on random tokens, forwards and backwards.
      upload: number of entries of the adapter.
      engine: name of the per-example engine of the step.
    """

    step: Work
    forward: Work
    vetting: Work
    upload: int
    engine: str

    @classmethod
    def none(cls) -> "Trials":
        """Returns no work at all, where weights alone are counted."""
        return cls(Work(), Work(), Work(), 0, "")


def try_emulator(package: PaperPackage, spec: AdapterSpec, batches: Batches, *, stored: bool) -> Trials:
    """Returns the work of a site's model.

    Args:
      package: the emulator.
      spec: spec of the adapter; its slots are filled in here.
      batches: sizes of the examples.
      stored: whether dense layers keep their codes and widen them at each call.

    Raises:
      UnsupportedModel, ConfigError: the adapter does not fit the model's blocks.
    """
    few, more = (_emulator(package, spec, batches, count, stored=stored) for count in (FEW, MORE))
    return scaled(few, more, package.running)


Lines = tuple[Trials, Trials]  # with `FEW` and with `MORE` blocks in the middle


def try_lines(
    package: PaperPackage, spec: AdapterSpec, batches: Batches, other: Lines | None = None, *, head: bool = False
) -> Lines:
    """Returns the work with `FEW` and with `MORE` blocks in float32; only the step is tried, for a quick comparison.

    Args:
      package: the emulator.
      spec: spec of the adapter; its slots are filled in here.
      batches: sizes of the examples.
      other: lines of an emulator with the same ends. They tell the share of the ends, which saves the second run.
      head: whether an untied head keeps its codes, so that it makes the logits of a whole batch.

    Raises:
      UnsupportedModel, ConfigError: the adapter does not fit the model's blocks.
    """
    few = _emulator(package, spec, batches, FEW, stored=False, quick=True, head=head)
    if other is None:
        return few, _emulator(package, spec, batches, MORE, stored=False, quick=True, head=head)
    # The ends take what the other emulator takes without its one block; what is left is one block of this emulator.
    return few, replace(
        few,
        step=_line(scaled(*other, 0).step, few.step, MORE, start=0),
        forward=_line(scaled(*other, 0).forward, few.forward, MORE, start=0),
        vetting=_line(scaled(*other, 0).vetting, few.vetting, MORE, start=0),
    )


def _emulator(
    package: PaperPackage,
    spec: AdapterSpec,
    batches: Batches,
    count: int,
    *,
    stored: bool,
    quick: bool = False,
    head: bool = False,
) -> Trials:
    outline, design = package.outline, package.design
    model = outline.cut(design.first, design.last, count)
    tower = model.get_submodule(outline.tower)
    for place in range(design.first, design.first + count if package.kept else 0):
        paper = package.kept[-1][0]
        tower[place] = with_codes(paper, outline.stored) if stored else copy.deepcopy(paper.block)
    if stored or head:
        keep_codes(model, package.tables, outline.stored, except_in=outline.tower)
    return _measure(model, outline, spec, design, batches, quick=quick)


def with_widening(trials: Trials, package: PaperPackage) -> Trials:
    """Returns the work of a quick trial, with about what the widening of stored weights adds to it."""
    weights = sum(count * sum(p.numel() for p in paper.block.parameters()) for paper, count in package.kept)
    more = Work(DECODED * package.largest, 0, WIDENING * weights)
    step = Work(trials.step.peak + more.peak, trials.step.flops, trials.step.traffic + 2 * more.traffic)
    return replace(trials, step=step)


def try_full(package: PaperPackage, spec: AdapterSpec, batches: Batches) -> Trials:
    """Returns the work of the full model with the adapter in the package's slots; raises as `try_emulator`."""
    outline, design = package.outline, package.design
    pairs = [
        _measure(outline.cut(design.first, design.last, count), outline, spec, design, batches) for count in (FEW, MORE)
    ]
    return scaled(pairs[0], pairs[1], len(outline.blocks) - design.first - design.last)


def _measure(
    model: Any, outline: Outline, spec: AdapterSpec, design: Design, batches: Batches, *, quick: bool = False
) -> Trials:
    total = len(model.get_submodule(outline.tower))
    places = range(total) if design.shape == PARALLEL else [*range(design.first), *range(total - design.last, total)]
    task, slots = outline.task, tuple(f"{outline.tower}.{place}" for place in places)
    vetting = Work() if quick else _vetting(model, slots)
    model = attach(model, replace(spec, slots=slots)).eval()
    layout = Layout.of(model)
    batch = task.dummy_batch(model, batches.length, seed=0).select([0] * batches.physical).to(META)
    step, engine = _step(model, task, batch)
    if quick:
        share = EXAMPLES * LENGTH / (batches.physical * batches.length)
        vetting = replace(step.times(share), peak=round(share * step.peak))
        return Trials(step, step.times(0.5), vetting, layout.size, engine)
    with torch.no_grad(), MetaRun.on(model) as run:
        task.losses(model, batch)
    return Trials(step, run.work, vetting, layout.size, engine)


def _step(model: Any, task: Any, batch: Any) -> tuple[Work, str]:
    """Returns the work of the first engine that takes the model, in the order of the table."""
    order = [name for name in ENGINES if name != "hooks"]
    for name in order if routed(model) is None else [ALONE]:
        records = batch.select([0]) if name == ALONE else batch
        try:
            with ENGINES[name](model) as engine, MetaRun.on(model) as run:
                engine.add(task.losses, records, _ones)
            return run.work.times(len(batch) / len(records)), name
        except PrivacyRefusal:
            continue
    raise PrivacyRefusal("no engine takes this model; choose another adapter method")


def _vetting(model: Any, slots: tuple[str, ...]) -> Work:
    """Returns the work of a pass forwards and backwards on the vetting's random tokens; none for other inputs."""
    if getattr(model, "main_input_name", "") != "input_ids" or getattr(model.config, "is_encoder_decoder", False):
        return Work()
    watched = model.get_submodule(slots[0])
    handle = watched.register_forward_pre_hook(_with_gradient)
    try:
        with MetaRun.on(model) as run:
            output = model(input_ids=torch.zeros((EXAMPLES, LENGTH), dtype=torch.long, device=META))[0].float()
            flat = output.reshape(-1, output.shape[-1])
            labels = torch.zeros(len(flat), dtype=torch.long, device=META)
            functional.cross_entropy(flat, labels, reduction="sum").backward()
    finally:
        handle.remove()
    return run.work


def _with_gradient(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] + torch.zeros_like(args[0], requires_grad=True), *args[1:])


def _ones(norms: Tensor, positions: tuple[int, ...]) -> Tensor:
    return torch.ones_like(norms)


def scaled(few: Trials, more: Trials, blocks: int) -> Trials:
    """Returns the work with so many blocks in the middle, from the work with `FEW` and with `MORE`."""
    return Trials(
        step=_line(few.step, more.step, blocks),
        forward=_line(few.forward, more.forward, blocks),
        vetting=_line(few.vetting, more.vetting, blocks),
        upload=few.upload + (blocks - FEW) * (more.upload - few.upload),
        engine=more.engine,
    )


def _line(few: Work, more: Work, blocks: int, start: int = FEW) -> Work:
    """Returns the work at so many blocks on the line through the works at `start` and at one more."""
    rest = blocks - start
    return Work(
        max(0, few.peak + rest * (more.peak - few.peak)),
        max(0, few.flops + rest * (more.flops - few.flops)),
        max(0, few.traffic + rest * (more.traffic - few.traffic)),
    )
