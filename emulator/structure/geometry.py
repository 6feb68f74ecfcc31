"""The geometry of an emulator: which blocks carry adapters, which are shipped verbatim, and which are the middle."""

from dataclasses import dataclass

from torch import nn

from offsite.emulator.structure.ends import PARALLEL, SANDWICH, check_ends
from offsite.emulator.structure.towers import Tower, blocks_at, find_towers, main_tower
from offsite.errors import ConfigError, lookup


@dataclass(frozen=True)
class Geometry:
    """The first and last blocks of one tower, which are shipped verbatim; the middle between them may be compressed.

    In a sandwich the ends are the slots: the middle can be anything. In a parallel emulator every block is a slot, so
    each block keeps its shapes and stays in its place.

    Attributes:
      tower: module path of the tower.
      first: number of verbatim blocks at the tower's input end, >= 0.
      last: number of verbatim blocks at the tower's output end, >= 0.
      shape: "sandwich", where first + last >= 1, or "parallel".

    Raises:
      ConfigError: a count is negative, no block would carry an adapter, or the shape is not known.
    """

    tower: str
    first: int = 2
    last: int = 2
    shape: str = SANDWICH

    def __post_init__(self) -> None:
        check_ends(self.first, self.last, self.shape)

    @classmethod
    def of(cls, model: nn.Module, first: int = 2, last: int = 2, shape: str = SANDWICH) -> "Geometry":
        """Returns a geometry over the model's main tower."""
        return cls(main_tower(model).path, first, last, shape)

    def blocks(self, model: nn.Module) -> tuple[str, ...]:
        """Returns the module paths of all blocks of the tower, in order; raises as `middle` does."""
        return self._tower(model).blocks

    def slots(self, model: nn.Module) -> tuple[str, ...]:
        """Returns the module paths of the blocks that carry adapters, in order; raises as `middle` does."""
        return self.blocks(model) if self.shape == PARALLEL else self.ends(model)

    def ends(self, model: nn.Module) -> tuple[str, ...]:
        """Returns the module paths of the blocks that are shipped verbatim, in order; raises as `middle` does."""
        blocks = self._tower(model).blocks
        return blocks[: self.first] + blocks[len(blocks) - self.last :]

    def middle(self, model: nn.Module) -> tuple[str, ...]:
        """Returns the module paths of the blocks between the verbatim blocks, in order; at least one.

        Raises:
          UnknownName: the model has no tower of that path.
          ConfigError: the verbatim blocks cover the whole tower.
        """
        blocks = self._tower(model).blocks
        return blocks[self.first : len(blocks) - self.last]

    @property
    def apart(self) -> bool:
        """Whether other modules stand between the tower's blocks."""
        return Tower(self.tower, ()).apart

    def _tower(self, model: nn.Module) -> Tower:
        tower = lookup({tower.path: tower for tower in find_towers(model)}, self.tower, "tower")
        if len(tower.blocks) <= self.first + self.last:
            raise ConfigError(
                f"first={self.first} last={self.last}: the tower {self.tower!r} has {len(tower.blocks)} blocks, so no "
                f"middle is left and the whole model would be shipped; choose first + last < {len(tower.blocks)}"
            )
        return tower


def slot_paths(model: nn.Module, geometry: Geometry) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns (paths of the slots' blocks, paths of all blocks) of a geometry's tower; an adapter may be attached."""
    names = blocks_at(model, geometry.tower)
    if geometry.shape == PARALLEL:
        return names, names
    return names[: geometry.first] + names[len(names) - geometry.last :], names
