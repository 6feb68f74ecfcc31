"""The middle of one model: its blocks, its public examples, and which blocks may be left out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from offsite.emulator.calibration.output_gradients import cotangent_moments
from offsite.emulator.calibration.source import Source
from offsite.emulator.calibration.stream import Hidden, Run, Stream, begin, influence, private
from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.structure.towers import signature, usual_signature
from offsite.errors import ConfigError, UnsupportedModel

# The mean loss on public examples, whole or in chunks that are summed; each chunk's graph is freed before the next.
Losses = Callable[[nn.Module], Tensor | Iterable[Tensor]]


@dataclass(frozen=True)
class Calibration:
    """Public examples as the functions that a build calls; never a site's data.

    Attributes:
      run: function that calls a model with the examples, without gradients; the result is ignored.
      losses: function that returns a model's mean loss on some of the examples, for compressors that look at gradients;
        None without them.
    """

    run: Run
    losses: Losses | None = None


class Middle:
    """The blocks between the two ends of a tower."""

    def __init__(self, source: Source, geometry: Geometry, calibration: Calibration | None) -> None:
        self.source = source
        self.geometry = geometry
        self.calibration = calibration
        self.blocks = geometry.middle(source.model)
        self.tower = geometry.blocks(source.model)
        modules = [source.model.get_submodule(path) for path in self.tower]
        self.apart = geometry.apart
        usual = usual_signature(modules)
        # A block with a tensor of its own (T5's relative positions) serves the others, so it is never left out. Blocks
        # that stand apart differ in width, and share no tensor.
        odd = tuple(path for path, m in zip(self.tower, modules, strict=True) if signature(m) != usual)
        self.alone = () if self.apart else odd
        # The feed-forward networks of a block, by the block's layers; found by trial, once for alike blocks.
        self.pairs: dict[tuple[str, ...], list[tuple[tuple[tuple[str, int], ...], str]]] = {}
        self.skippable = tuple(path for path in self.blocks if path not in self.alone)

    def place(self, path: str) -> int:
        """Returns the place of a block in its tower, counted from 0."""
        return self.tower.index(path)

    @cached_property
    def stream(self) -> Stream:
        """The public examples at the tower's entry; the first access makes them, by one cheap pass."""
        run = self.calibration.run if self.calibration else None
        return begin(self.source, self.tower, self.alone, run, apart=self.apart)

    @cached_property
    def losses(self) -> Losses:
        """The losses on public examples.

        Raises:
          ConfigError: the calibration has no losses.
        """
        if self.calibration is None or self.calibration.losses is None:
            raise ConfigError("calibration=None: this compressor needs losses on public examples; give public records")
        return self.calibration.losses

    @cached_property
    def cotangents(self) -> dict[str, Tensor]:
        """Second moments of the public loss' gradients at each middle block's output, (width, width) by path.

        Raises:
          ConfigError: the calibration has no losses.
        """
        return cotangent_moments(self.source, self.blocks, self.losses)

    @cached_property
    def influences(self) -> dict[str, float]:
        """Block Influence of each block of the middle on the public examples, in 0..2, by path."""
        influences: dict[str, float] = {}
        hidden: Hidden = self.stream.inputs
        for path in self.tower:
            hidden = self.stream.entering(path, hidden)
            with self.source.open(path) as block:
                after = self.stream.run(private(block), path, hidden)
            if path in self.blocks:
                influences[path] = influence(hidden, after)
            hidden = after
        return influences

    def check_skippable(self, name: str, paths: Iterable[str]) -> None:
        """Refuses to leave out a block that serves the others.

        Args:
          name: name of the compressor, for the message.
          paths: paths of the blocks to leave out.

        Raises:
          UnsupportedModel: the other blocks use a tensor of a block; the message names the block.
        """
        if wrong := [path for path in paths if path not in self.skippable]:
            raise UnsupportedModel(
                f"{name}@{self.place(wrong[0])}: block {wrong[0]} has a tensor that the others use; leave it in"
            )
