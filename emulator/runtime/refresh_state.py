"""The biases of an emulator that may move between rounds, found alike by both sides; nothing else of it ever does."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from offsite.adapter.targets import hidden_size, is_linear
from offsite.emulator.calibration.middle import Middle
from offsite.emulator.calibration.source import MemorySource
from offsite.emulator.package.manifest import CONFIG, Manifest
from offsite.emulator.package.plan import Plan, Segment
from offsite.emulator.package.recipe import Step
from offsite.emulator.structure.from_config import empty_model
from offsite.emulator.structure.replacements import weight_of
from offsite.errors import ConfigError, MalformedMessage, RangeError

# The values of all biases that may move, (name, float16 little endian), by name; () where none has moved.
Refresh = tuple[tuple[str, bytes], ...]
MAX_SHARE = 0.02  # of the package's bytes
FLOATS = ("bf16", "fp16", "fp32")
WIRE = "<f2"


@dataclass(frozen=True)
class Frame:
    """The tower of a package as the full model has it, blocks that were left out in their places.

    Attributes:
      tower: paths of all blocks.
      alone: those with a tensor of their own that the others use.
      before: blocks in front of the middle.
      stretches: of the middle.
      width: of the hidden states.
    """

    tower: tuple[str, ...]
    alone: tuple[str, ...]
    before: tuple[str, ...]
    stretches: tuple[Segment, ...]
    width: int

    @property
    def gone(self) -> frozenset[str]:
        """Paths of the blocks that were left out."""
        return frozenset(path for stretch in self.stretches for path in stretch.gone)

    @classmethod
    def of(cls, folder: Path, manifest: Manifest) -> "Frame":
        """Returns the frame of a package that was verified against its manifest.

        It is read off the configuration: in a loaded emulator blocks are no longer alike.
        """
        text = (folder / CONFIG).read_text(encoding="utf-8")
        with torch.device("meta"):
            whole = empty_model(text, manifest.auto, torch.float32)
        middle = Middle(MemorySource(whole), manifest.geometry, None)
        plan = Plan.whole(middle.blocks, apart=middle.apart).skip(manifest.skipped).share(manifest.shared)
        width = hidden_size(whole.get_submodule(middle.tower[0]))
        before = middle.tower[: manifest.geometry.first]
        return cls(middle.tower, middle.alone, before, tuple(plan.spans()), width)


@dataclass(frozen=True)
class Refreshable:
    """The last bias of each block of the middle that runs on weights of its own.

    Attributes:
      tensors: the emulator's own parameters, by name and in the order of names.
      shipped: their values in the package.
    """

    tensors: Mapping[str, nn.Parameter]
    shipped: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, manifest: Manifest, frame: Frame) -> "Refreshable":
        """Returns the biases of a loaded package, before any adapter is attached to it.

        One is the bias of a block's last dense layer that writes hidden states, where the package carries it and it
        fits float16.
        """
        found: dict[str, nn.Parameter] = {}
        for stretch in frame.stretches:
            name = _last_bias(model, stretch, frame.width)
            if name is not None and manifest.storage.get(name) in FLOATS:
                bias = model.get_parameter(name)
                if bool((bias.detach().abs() < torch.finfo(torch.float16).max).all()):
                    found[name] = bias
        tensors = dict(sorted(found.items()))
        return cls(tensors, {name: bias.detach().clone() for name, bias in tensors.items()})

    def check_any(self, every: int, manifest: Manifest) -> None:
        """Refuses to promise refreshes of an emulator that has nothing to move, or too much for what it is.

        Raises:
          ConfigError: naming what to change.
        """
        if manifest.geometry.apart:
            raise ConfigError(
                f"emulator.refresh={every}: between this model's blocks stand others, past which none is aligned; set "
                "emulator.refresh = 0"
            )
        if not self.tensors:
            # Where a norm stands behind the last layer, as in Gemma, centering leaves no bias either.
            centred = any(Step.parse(text).name == "center" for text in manifest.recipe)
            remedy = "" if centred else 'add "center" behind the quantiser, or '
            raise ConfigError(
                f"emulator.refresh={every}: compress={list(manifest.recipe)} leaves no bias at the end of a block that "
                f"could move; {remedy}set emulator.refresh = 0"
            )
        share = size_of(self.values()) / manifest.package_bytes
        if share > MAX_SHARE:
            raise ConfigError(
                f"emulator.refresh={every}: a refresh is {share:.1%} of the package, and at most {MAX_SHARE:.0%} may "
                "be; ship the middle at more bits, or set emulator.refresh = 0"
            )

    def values(self) -> Refresh:
        """Returns the biases as they are now, rounded to float16."""
        return tuple((name, bias.detach().numpy().astype(WIRE).tobytes()) for name, bias in self.tensors.items())

    def put(self, refresh: Refresh) -> None:
        """Writes biases into the emulator; () is the shipped ones.

        Raises:
          MalformedMessage: they are not exactly those that may move.
          RangeError: one has another length, or a value that is not finite; then none is written.
        """
        moved = self.read(refresh) if refresh else self.shipped
        with torch.no_grad():
            for name, bias in self.tensors.items():
                bias.copy_(moved[name])

    def read(self, refresh: Refresh) -> dict[str, Tensor]:
        """Returns the values of a refresh as float32 tensors; see `put` for what is raised."""
        names = [name for name, _ in refresh]
        if names != list(self.tensors):
            wrong = sorted(set(names) ^ set(self.tensors)) or names
            raise MalformedMessage(
                f"refresh tensor={wrong[0]!r}: exactly the {len(self.tensors)} biases that may move are sent, each "
                "once and by name; refuse it"
            )
        return {name: _tensor(name, values, self.tensors[name]) for name, values in refresh}


def size_of(refresh: Refresh) -> int:
    """Returns the bytes of a refresh: its names and values."""
    return sum(len(name) + len(values) for name, values in refresh)


def _last_bias(model: nn.Module, stretch: Segment, width: int) -> str | None:
    """Returns the name of the bias of the last layer that writes hidden states, or None where there is none."""
    if stretch.head is None or stretch.owner is not None:
        return None
    block = model.get_submodule(stretch.head)
    writers = [p for p, m in block.named_modules(prefix=stretch.head) if is_linear(m) and len(weight_of(m)) == width]
    if not writers or getattr(model.get_submodule(writers[-1]), "bias", None) is None:
        return None
    return f"{writers[-1]}.bias"


def _tensor(name: str, values: bytes, like: Tensor) -> Tensor:
    if len(values) != 2 * like.numel():
        raise RangeError(f"refresh tensor={name} bytes={len(values)}: must be {2 * like.numel()}; refuse it")
    array = np.frombuffer(values, dtype=WIRE).astype(np.float32)
    if not np.isfinite(array).all():
        raise RangeError(f"refresh tensor={name}: a value is not finite; refuse it")
    return torch.from_numpy(array).reshape(like.shape)
