"""The middle of one model: its blocks, what the public examples are there, and which blocks may be left out."""

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
    """Public examples, as the functions that a build needs of them; never a site's data.

    Attributes:
      run: calls the model it is given with the examples; its result is ignored, no gradient is kept.
      losses: the mean loss of a model on some of the examples, for compressors that look at gradients.
    """

    run: Run
    losses: Losses | None = None


class Middle:
    """The blocks between the slots' blocks."""

    def __init__(self, source: Source, geometry: Geometry, calibration: Calibration | None) -> None:
        self.source = source
        self.geometry = geometry
        self.calibration = calibration
        self.blocks = geometry.middle(source.model)
        self.tower = geometry.blocks(source.model)
        modules = [source.model.get_submodule(path) for path in self.tower]
        self.apart = geometry.apart
        usual = usual_signature(modules)
        # A block with a tensor of its own (T5's relative positions) serves the others: it is never left out. Blocks
        # that stand apart have other widths, and nothing of each other.
        odd = tuple(path for path, m in zip(self.tower, modules, strict=True) if signature(m) != usual)
        self.alone = () if self.apart else odd
        # Where the feed-forward networks are in a block, by the block's layers; found by trial, once for alike blocks.
        self.pairs: dict[tuple[str, ...], list[tuple[tuple[tuple[str, int], ...], str]]] = {}
        self.skippable = tuple(path for path in self.blocks if path not in self.alone)

    def place(self, path: str) -> int:
        """Returns the place of a block in its tower, counted from 0."""
        return self.tower.index(path)

    @cached_property
    def stream(self) -> Stream:
        """The public examples at the tower's entry; made when first asked, by one cheap pass."""
        run = self.calibration.run if self.calibration else None
        return begin(self.source, self.tower, self.alone, run, apart=self.apart)

    @cached_property
    def losses(self) -> Losses:
        """The losses on public examples.

        Raises:
          ConfigError: none were given.
        """
        if self.calibration is None or self.calibration.losses is None:
            raise ConfigError("calibration=None: this compressor needs losses on public examples; give public records")
        return self.calibration.losses

    @cached_property
    def cotangents(self) -> dict[str, Tensor]:
        """Second moments (width, width) of the public loss' gradients at the output of each block of the middle.

        Raises:
          ConfigError: no losses were given.
        """
        return cotangent_moments(self.source, self.blocks, self.losses)

    @cached_property
    def influences(self) -> dict[str, float]:
        """Block Influence of each block of the middle on the public examples, 0..2."""
        found: dict[str, float] = {}
        hidden: Hidden = self.stream.inputs
        for path in self.tower:
            hidden = self.stream.entering(path, hidden)
            with self.source.open(path) as block:
                after = self.stream.run(private(block), path, hidden)
            if path in self.blocks:
                found[path] = influence(hidden, after)
            hidden = after
        return found

    def check_skippable(self, name: str, paths: Iterable[str]) -> None:
        """Refuses to leave out a block that serves the others.

        Raises:
          UnsupportedModel: naming the block.
        """
        if wrong := [path for path in paths if path not in self.skippable]:
            raise UnsupportedModel(
                f"{name}@{self.place(wrong[0])}: block {wrong[0]} has a tensor that the others use; leave it in"
            )
