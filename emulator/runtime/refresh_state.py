"""The biases of an emulator that may move between rounds; both sides find the same ones, and nothing else moves."""

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

# The values of all biases that may move, (name, float16 little endian), sorted by name; () before the first refresh.
Refresh = tuple[tuple[str, bytes], ...]
MAX_SHARE = 0.02  # largest share of a refresh in the package's bytes
FLOATS = ("bf16", "fp16", "fp32")
WIRE = "<f2"


@dataclass(frozen=True)
class Frame:
    """The tower of a package as the full model has it, with the left-out blocks in their places.

    Attributes:
      tower: paths of all blocks, in order.
      alone: paths of the blocks that own a tensor which the other blocks use.
      before: paths of the blocks in front of the middle.
      segments: segments of the middle, in order.
      width: width of the hidden states.
    """

    tower: tuple[str, ...]
    alone: tuple[str, ...]
    before: tuple[str, ...]
    segments: tuple[Segment, ...]
    width: int

    @property
    def gone(self) -> frozenset[str]:
        """Paths of the left-out blocks."""
        return frozenset(path for segment in self.segments for path in segment.gone)

    @classmethod
    def of(cls, folder: Path, manifest: Manifest) -> "Frame":
        """Returns the frame of a package that was verified against its manifest.

        The frame comes from the configuration, since the blocks of a loaded emulator are no longer alike.
        """
        text = (folder / CONFIG).read_text(encoding="utf-8")
        whole = empty_model(text, manifest.auto, torch.float32, allocated=False)
        middle = Middle(MemorySource(whole), manifest.geometry, None)
        plan = Plan.whole(middle.blocks, apart=middle.apart).skip(manifest.skipped).share(manifest.shared)
        width = hidden_size(whole.get_submodule(middle.tower[0]))
        before = middle.tower[: manifest.geometry.first]
        return cls(middle.tower, middle.alone, before, tuple(plan.segments()), width)


@dataclass(frozen=True)
class Refreshable:
    """The last bias of each block of the middle that runs on weights of its own.

    Attributes:
      tensors: the biases as parameters of the emulator, by name, in the order of names.
      shipped: the biases' values in the package, by name.
    """

    tensors: Mapping[str, nn.Parameter]
    shipped: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, manifest: Manifest, frame: Frame) -> "Refreshable":
        """Returns the biases that may move in a loaded package, before any adapter is attached to it.

        Of each block this is the bias of the last dense layer that writes hidden states, if the package stores that
        bias and its values fit float16.
        """
        movable: dict[str, nn.Parameter] = {}
        for segment in frame.segments:
            name = _last_bias(model, segment, frame.width)
            if name is not None and manifest.storage.get(name) in FLOATS:
                bias = model.get_parameter(name)
                if bool((bias.detach().abs() < torch.finfo(torch.float16).max).all()):
                    movable[name] = bias
        tensors = dict(sorted(movable.items()))
        return cls(tensors, {name: bias.detach().clone() for name, bias in tensors.items()})

    def check_any(self, every: int, manifest: Manifest) -> None:
        """Refuses to promise refreshes of an emulator that has no bias to move, or too many for its size.

        Args:
          every: number of rounds between refreshes, for the message.
          manifest: the package's manifest.

        Raises:
          ConfigError: the emulator cannot be refreshed; the message names the setting to change.
        """
        if manifest.geometry.apart:
            raise ConfigError(
                f"emulator.refresh={every}: other modules stand between this model's blocks, so no block can be "
                "aligned; set emulator.refresh = 0"
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
                f"emulator.refresh={every}: a refresh has {share:.1%} of the package's bytes, but at most "
                f"{MAX_SHARE:.0%} are allowed; ship the middle at more bits, or set emulator.refresh = 0"
            )

    def values(self) -> Refresh:
        """Returns the biases' present values, rounded to float16."""
        return tuple(
            (name, bias.detach().cpu().float().numpy().astype(WIRE).tobytes()) for name, bias in self.tensors.items()
        )

    def put(self, refresh: Refresh) -> None:
        """Writes the values of a refresh into the emulator; () writes the shipped values.

        Raises:
          MalformedMessage: the refresh does not hold exactly the biases that may move.
          RangeError: a bias has another length, or a value that is not finite; then no bias is written.
        """
        moved = self.read(refresh) if refresh else self.shipped
        with torch.no_grad():
            for name, bias in self.tensors.items():
                bias.copy_(moved[name])

    def read(self, refresh: Refresh) -> dict[str, Tensor]:
        """Returns the values of a refresh as float32 tensors, by name; raises as `put` does."""
        names = [name for name, _ in refresh]
        if names != list(self.tensors):
            wrong = sorted(set(names) ^ set(self.tensors)) or names
            raise MalformedMessage(
                f"refresh tensor={wrong[0]!r}: a refresh holds exactly the {len(self.tensors)} biases that may move, "
                "each once, sorted by name; refuse it"
            )
        return {name: _tensor(name, values, self.tensors[name]) for name, values in refresh}


def size_of(refresh: Refresh) -> int:
    """Returns the size of a refresh in bytes, names and values."""
    return sum(len(name) + len(values) for name, values in refresh)


def _last_bias(model: nn.Module, segment: Segment, width: int) -> str | None:
    """Returns the name of the bias of the last layer that writes hidden states; None if there is no such bias."""
    if segment.head is None or segment.owner is not None:
        return None
    block = model.get_submodule(segment.head)
    writers = [p for p, m in block.named_modules(prefix=segment.head) if is_linear(m) and len(weight_of(m)) == width]
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
