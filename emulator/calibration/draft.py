"""An emulator while it is made: the middle stretch by stretch, each seeing what really reaches it in the emulator.

Two streams of the same public examples go side by side: what the full model makes of them, which is the target, and
what the emulator has made of them so far, which is the input. An error of one stretch is thus seen, and made good for,
by the next. Where other modules stand between the blocks, each block sees what reaches it in the full model instead.
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
    """One stretch of the emulator's middle, its modules float32 and its own.

    Attributes:
      stretch: which blocks.
      blocks: what stands at each path.
      storage: how a tensor will be stored, by full name, where it is not verbatim.
      pieces: its codes, where they were chosen with care and not by rounding.
      changed: names of tensors that are not the full model's.
    """

    stretch: Segment
    blocks: dict[str, nn.Module]
    storage: dict[str, str] = field(default_factory=dict)
    pieces: dict[str, Quantised] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    @property
    def carrier(self) -> str | None:
        """The first block that is left out, where a patch goes."""
        return self.stretch.gone[0] if self.stretch.gone else None

    def matrices(self) -> dict[str, Tensor]:
        """Returns the stretch's own parameters of two and more dimensions, by full name."""
        found: dict[str, Tensor] = {}
        for path, block in self.blocks.items():
            if path != self.stretch.head or self.stretch.owner is None:
                found |= {name: p for name, p in block.named_parameters(prefix=path) if p.dim() >= 2}
        return found

    def layers(self) -> dict[str, nn.Module]:
        """Returns the dense layers of the block that runs, by full path; none where its weights are another's."""
        head = self.stretch.head
        if head is None or self.stretch.owner is not None:
            return {}
        return {path: m for path, m in self.blocks[head].named_modules(prefix=head) if is_linear(m)}

    def module(self, path: str) -> nn.Module:
        """Returns the module at a full path."""
        for block, module in self.blocks.items():
            if path == block or path.startswith(f"{block}."):
                return module.get_submodule(path[len(block) + 1 :])
        raise KeyError(path)

    def replace(self, path: str, module: nn.Module) -> None:
        """Puts a part in the place of a layer."""
        block = next(one for one in self.blocks if path.startswith(f"{one}."))
        self.blocks[block].set_submodule(path[len(block) + 1 :], module)
        self.forget(path)
        self.changed |= {name for name, _ in module.named_parameters(prefix=path)}

    def forget(self, path: str) -> None:
        """Drops what was decided about the storage of a layer's tensors, because the layer changed."""
        for table in (self.storage, self.pieces):
            for name in [name for name in table if name.startswith(f"{path}.")]:
                del table[name]

    def store(self, name: str, scheme: Scheme, quantised: Quantised) -> None:
        """Takes codes for a tensor, and their values into the stretch, so that what follows sees them."""
        path, _, leaf = name.rpartition(".")
        parameter = getattr(self.module(path), leaf)
        with torch.no_grad():
            parameter.copy_(dequantize(quantised, tuple(parameter.shape), scheme))
        self.storage[name], self.pieces[name] = str(scheme), quantised
        self.changed.add(name)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Returns the stretch's own floating parameters, by full name."""
        found: dict[str, nn.Parameter] = {}
        for path, block in self.blocks.items():
            if path != self.stretch.head or self.stretch.owner is None:
                found |= {name: p for name, p in block.named_parameters(prefix=path) if p.is_floating_point()}
        return found

    def run(self, stream: Stream, hidden: Hidden) -> Hidden:
        """Returns what the stretch makes of hidden states."""
        for path in self._running():
            hidden = stream.run(self.blocks[path], path, hidden)
        return hidden

    def forward(self, stream: Stream, call: int, hidden: Tensor) -> Tensor:
        """Returns what the stretch makes of the hidden states of one call, with gradients where they are enabled."""
        for path in self._running():
            hidden = bare(stream.calls[path][call].on(self.blocks[path], hidden))
        return hidden

    def _running(self) -> list[str]:
        paths = self.stretch.paths
        return [path for path in paths if path == self.stretch.head or PATCH in self.blocks[path]._modules]


@dataclass
class Station:
    """What a compressor sees of one stretch.

    Attributes:
      middle: of the model.
      span: to be changed.
      inputs: what enters the stretch in the emulator, float32 (examples, positions, width), one for each call; empty
        where no compressor of the recipe looks at examples.
      target: what leaves the stretch in the full model, as `inputs`.
    """

    middle: Middle
    span: DraftSegment
    inputs: Hidden
    target: Hidden

    @property
    def stream(self) -> Stream:
        """The public examples."""
        return self.middle.stream

    def outputs(self) -> Hidden:
        """Returns what leaves the stretch in the emulator, as it is now."""
        return self.span.run(self.stream, self.inputs)

    def observe(self, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
        """Returns what enters each of some dense layers, float32 (positions, in), and runs the block that runs once."""
        return self.observe_with_outputs(layers)[0]

    def observe_with_outputs(self, layers: dict[str, nn.Module]) -> tuple[dict[str, Tensor], Tensor]:
        """Returns what enters each of some dense layers, and what leaves the block, (positions, width), of one run."""
        head = self.span.stretch.head
        if head is None:
            return {}, rows(self.inputs)
        seen: dict[str, list[Tensor]] = {path: [] for path in layers}

        def watch(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen[path].append(args[0].reshape(-1, args[0].shape[-1]))

            return layers[path].register_forward_pre_hook(hook)

        handles = [watch(path) for path in layers]
        try:
            after = self.stream.run(self.span.blocks[head], head, self.inputs)
        finally:
            for handle in handles:
                handle.remove()
        return {path: torch.cat(parts) for path, parts in seen.items() if parts}, rows(after)


def spans(middle: Middle, plan: Plan, *, public: bool) -> Iterator[Station]:
    """Yields the stretches of a plan in order, each to be changed before the next is asked for.

    Args:
      middle: of the model.
      plan: which blocks stay.
      public: whether public examples go along; without them a station has no inputs and no target.
    """
    teacher = _entry(middle) if public else None
    emulated = teacher
    made: dict[str, nn.Module] = {}
    for stretch in plan.spans():
        forms = middle.stream.forms if stretch.gone else {}
        blocks: dict[str, nn.Module] = {}
        for path in stretch.paths:
            with middle.source.open(path) as block:
                if path == stretch.head:
                    blocks[path] = private(block)
                else:
                    blocks[path] = skipped(block, forms[path])
                if teacher is not None and emulated is not None:
                    teacher, emulated = (middle.stream.entering(path, one) for one in (teacher, emulated))
                    teacher = middle.stream.run(private(block), path, teacher)
        if stretch.owner and stretch.head:
            share_parts(blocks[stretch.head], made[stretch.owner])
            tie_weights(blocks[stretch.head], made[stretch.owner], stretch.head)
        station = Station(middle, DraftSegment(stretch, blocks), emulated or [], teacher or [])
        yield station
        if stretch.head and stretch.head in plan.shared.values():
            made[stretch.head] = blocks[stretch.head]
        if emulated is not None:
            emulated = station.outputs()


def share_parts(block: nn.Module, owner: nn.Module) -> None:
    """Gives a block parts of the same words as another's, empty, where the other's layers were replaced."""
    own = dict(block.named_modules())
    for path, module in owner.named_modules():
        if is_linear(module) and (word := spec_of(module)) != spec_of(own[path]):
            block.set_submodule(path, build_module(word))


def _entry(middle: Middle) -> Hidden:
    """Returns what enters the middle."""
    hidden = middle.stream.inputs
    for path in () if middle.apart else middle.tower[: middle.geometry.first]:
        with middle.source.open(path) as block:
            hidden = middle.stream.run(private(block), path, hidden)
    return hidden
