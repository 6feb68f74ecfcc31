"""Which blocks of a tower are slots' blocks, shipped verbatim, and which are the middle."""

from dataclasses import dataclass

from torch import nn

from emulator.towers import Tower, find_towers, main_tower
from errors import ConfigError, lookup


@dataclass(frozen=True)
class Geometry:
    """The first and last blocks of one tower carry adapters; what lies between may be compressed.

    Attributes:
      tower: module path of the tower.
      first: number of slots' blocks at its input end, >= 0.
      last: number of slots' blocks at its output end, >= 0; first + last >= 1.

    Raises:
      ConfigError: a count is negative, or both are 0.
    """

    tower: str
    first: int = 2
    last: int = 2

    def __post_init__(self) -> None:
        if self.first < 0 or self.last < 0 or self.first + self.last < 1:
            raise ConfigError(
                f"first={self.first} last={self.last}: neither may be negative and one must be at least 1, "
                "or no block carries an adapter; set first=2 last=2"
            )

    @classmethod
    def of(cls, model: nn.Module, first: int = 2, last: int = 2) -> "Geometry":
        """Returns the geometry over the model's main tower."""
        return cls(main_tower(model).path, first, last)

    def slots(self, model: nn.Module) -> tuple[str, ...]:
        """Returns the module paths of the slots' blocks, in order; see `middle` for what is raised."""
        blocks = self._tower(model).blocks
        return blocks[: self.first] + blocks[len(blocks) - self.last :]

    def middle(self, model: nn.Module) -> tuple[str, ...]:
        """Returns the module paths of the blocks between the slots' blocks, in order; at least one.

        Raises:
          UnknownName: the model has no tower of that path.
          ConfigError: the slots' blocks cover the whole tower.
        """
        blocks = self._tower(model).blocks
        return blocks[self.first : len(blocks) - self.last]

    def _tower(self, model: nn.Module) -> Tower:
        tower = lookup({tower.path: tower for tower in find_towers(model)}, self.tower, "tower")
        if len(tower.blocks) <= self.first + self.last:
            raise ConfigError(
                f"first={self.first} last={self.last}: the tower {self.tower!r} has {len(tower.blocks)} blocks, so no "
                f"middle is left and the whole model would be shipped; choose first + last < {len(tower.blocks)}"
            )
        return tower
