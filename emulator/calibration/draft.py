"""An emulator in the making: the middle segment by segment, each fitted to its real inputs in the emulator.

Two streams of the same public examples run side by side. The full model's hidden states are the target, and those of
the emulator made so far are the input. So each segment sees the error of the segment before and makes up for it. If
other modules stand between the blocks, each block sees its inputs in the full model instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offsite.adapter.targets import is_linear
from offsite.emulator.calibration.least_squares import rows
from offsite.emulator.calibration.middle import Middle
from offsite.emulator.calibration.stream import Hidden, Stream, bare, private
from offsite.emulator.package.apply_manifest import tie_weights
from offsite.emulator.package.plan import Plan, Segment
from offsite.emulator.package.quantization_scheme import Scheme
from offsite.emulator.package.quantize import Quantised, dequantize
from offsite.emulator.structure.identity_block import skipped
from offsite.emulator.structure.replacements import PATCH, build_module, spec_of


@dataclass
class DraftSegment:
    """One segment of the emulator's middle; the modules are float32 copies of the full model's.

    Attributes:
      segment: paths of the blocks that run and that are left out.
      blocks: present module at each path of the segment.
      storage: storage of each tensor that will not be stored verbatim, by full name.
      pieces: codes of each tensor whose codes a compressor chose, by full name.
      changed: full names of the tensors that are no longer the full model's.
    """

    segment: Segment
    blocks: dict[str, nn.Module]
    storage: dict[str, str] = field(default_factory=dict)
    pieces: dict[str, Quantised] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    @property
    def carrier(self) -> str | None:
        """Path of the first left-out block, where a patch goes; None if no block is left out."""
        return self.segment.gone[0] if self.segment.gone else None

    def matrices(self) -> dict[str, Tensor]:
        """Returns the segment's own parameters of two and more dimensions, by full name."""
        return {name: p for name, p in self._own_parameters() if p.dim() >= 2}

    def layers(self) -> dict[str, nn.Module]:
        """Returns the dense layers of the running block, by full path; {} if the block runs on another's weights."""
        head = self.segment.head
        if head is None or self.segment.owner is not None:
            return {}
        return {path: m for path, m in self.blocks[head].named_modules(prefix=head) if is_linear(m)}

    def module(self, path: str) -> nn.Module:
        """Returns the module at a full path."""
        for block, module in self.blocks.items():
            if path == block or path.startswith(f"{block}."):
                return module.get_submodule(path[len(block) + 1 :])
        raise KeyError(path)

    def replace(self, path: str, module: nn.Module) -> None:
        """Puts a part in the place of the layer at a full path."""
        block = next(block for block in self.blocks if path.startswith(f"{block}."))
        self.blocks[block].set_submodule(path[len(block) + 1 :], module)
        self.forget(path)
        self.changed |= {name for name, _ in module.named_parameters(prefix=path)}

    def forget(self, path: str) -> None:
        """Drops the storage chosen for a layer's tensors, because the layer changed."""
        for table in (self.storage, self.pieces):
            for name in [name for name in table if name.startswith(f"{path}.")]:
                del table[name]

    def store(self, name: str, scheme: Scheme, quantised: Quantised) -> None:
        """Takes codes for a tensor, and writes their values into the segment, so that later steps see them."""
        path, _, leaf = name.rpartition(".")
        parameter = getattr(self.module(path), leaf)
        with torch.no_grad():
            parameter.copy_(dequantize(quantised, tuple(parameter.shape), scheme))
        self.storage[name], self.pieces[name] = str(scheme), quantised
        self.changed.add(name)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Returns the segment's own floating parameters, by full name."""
        return {name: p for name, p in self._own_parameters() if p.is_floating_point()}

    def run(self, stream: Stream, hidden: Hidden) -> Hidden:
        """Returns the segment's output for hidden states, one tensor for each call; without gradients."""
        for path in self._running():
            hidden = stream.run(self.blocks[path], path, hidden)
        return hidden

    def forward(self, stream: Stream, call: int, hidden: Tensor) -> Tensor:
        """Returns the segment's output for the hidden states of one call, with gradients if they are enabled."""
        for path in self._running():
            hidden = bare(stream.calls[path][call].on(self.blocks[path], hidden))
        return hidden

    def _own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields name and parameter, but for a block that runs on another's weights."""
        for path, block in self.blocks.items():
            if path != self.segment.head or self.segment.owner is None:
                yield from block.named_parameters(prefix=path)

    def _running(self) -> list[str]:
        paths = self.segment.paths
        return [path for path in paths if path == self.segment.head or PATCH in self.blocks[path]._modules]


@dataclass
class SegmentContext:
    """One segment with the public examples at its ends, as a compressor gets it.

    Attributes:
      middle: the full model's middle.
      draft: the segment, which the compressor changes.
      inputs: hidden states that enter the segment in the emulator, float32 (examples, positions, width) for each call
        of the model; empty if no compressor of the recipe looks at examples.
      target: hidden states that leave the segment in the full model, in the same form as `inputs`.
    """

    middle: Middle
    draft: DraftSegment
    inputs: Hidden
    target: Hidden

    @property
    def stream(self) -> Stream:
        """The stream of public examples."""
        return self.middle.stream

    def outputs(self) -> Hidden:
        """Returns the present segment's outputs in the emulator, in the same form as `inputs`."""
        return self.draft.run(self.stream, self.inputs)

    def observe(self, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
        """Returns the inputs of some dense layers by path, float32 (positions, in), from one run of the head block."""
        return self.observe_with_outputs(layers)[0]

    def observe_with_outputs(self, layers: dict[str, nn.Module]) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the inputs of some dense layers, as `observe`, and the head block's outputs, (positions, width)."""
        head = self.draft.segment.head
        if head is None:
            return {}, rows(self.inputs)
        seen: dict[str, list[Tensor]] = {path: [] for path in layers}

        def watch(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen[path].append(args[0].reshape(-1, args[0].shape[-1]))

            return layers[path].register_forward_pre_hook(hook)

        handles = [watch(path) for path in layers]
        try:
            after = self.stream.run(self.draft.blocks[head], head, self.inputs)
        finally:
            for handle in handles:
                handle.remove()
        return {path: torch.cat(parts) for path, parts in seen.items() if parts}, rows(after)


def segment_contexts(middle: Middle, plan: Plan, *, public: bool) -> Iterator[SegmentContext]:
    """Yields the segments of a plan in order; each must be changed before the next is asked for.

    Args:
      middle: the full model's middle.
      plan: plan of the blocks that stay, are left out, or share weights.
      public: True to run public examples along; else a context has no inputs and no target.
    """
    teacher = _entry(middle) if public else None
    emulated = teacher
    owners: dict[str, nn.Module] = {}
    for segment in plan.segments():
        forms = middle.stream.forms if segment.gone else {}
        blocks: dict[str, nn.Module] = {}
        for path in segment.paths:
            with middle.source.open(path) as block:
                if path == segment.head:
                    blocks[path] = private(block)
                else:
                    blocks[path] = skipped(block, forms[path])
                if teacher is not None and emulated is not None:
                    teacher, emulated = (middle.stream.entering(path, states) for states in (teacher, emulated))
                    teacher = middle.stream.run(private(block), path, teacher)
        if segment.owner and segment.head:
            share_parts(blocks[segment.head], owners[segment.owner])
            tie_weights(blocks[segment.head], owners[segment.owner], segment.head)
        context = SegmentContext(middle, DraftSegment(segment, blocks), emulated or [], teacher or [])
        yield context
        if segment.head and segment.head in plan.shared.values():
            owners[segment.head] = blocks[segment.head]
        if emulated is not None:
            emulated = context.outputs()


def share_parts(block: nn.Module, owner: nn.Module) -> None:
    """Gives a block empty parts of the same specs where another block's layers were replaced."""
    own = dict(block.named_modules())
    for path, module in owner.named_modules():
        if is_linear(module) and (spec := spec_of(module)) != spec_of(own[path]):
            block.set_submodule(path, build_module(spec))


def _entry(middle: Middle) -> Hidden:
    """Returns the hidden states that enter the middle, one tensor for each call of the model."""
    hidden = middle.stream.inputs
    for path in () if middle.apart else middle.tower[: middle.geometry.first]:
        with middle.source.open(path) as block:
            hidden = middle.stream.run(private(block), path, hidden)
    return hidden
