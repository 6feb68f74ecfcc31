"""A recipe: compressors in order, each with an argument and, unless it takes the whole middle, with its blocks.

`int4:64` takes every block of the middle, `int8:64@2,5-7` the blocks at these places in the tower.
"""

from dataclasses import dataclass

from offsite.errors import ConfigError


@dataclass(frozen=True)
class Step:
    """One compressor of a recipe.

    Attributes:
      name: key of `COMPRESSORS`.
      argument: text behind the colon; "" without a colon.
      places: places of the blocks in the tower, counted from 0; None for the whole middle.
    """

    name: str
    argument: str
    places: frozenset[int] | None

    @classmethod
    def parse(cls, text: str) -> "Step":
        """Returns the step that a text describes, for example "int8:64@2,5-7".

        Raises:
          ConfigError: the text behind the @ is not a list of places.
        """
        head, at, where = text.partition("@")
        name, _, argument = head.partition(":")
        return cls(name, argument, _places(text, where) if at else None)

    def __str__(self) -> str:
        """Returns the text that `parse` reads."""
        head = f"{self.name}:{self.argument}" if self.argument else self.name
        return head if self.places is None else f"{head}@{ranges(self.places)}"


def ranges(places: frozenset[int]) -> str:
    """Returns places as a list of ranges, for example "2,5-7"."""
    runs: list[list[int]] = []
    for place in sorted(places):
        if runs and runs[-1][-1] + 1 == place:
            runs[-1].append(place)
        else:
            runs.append([place])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _places(text: str, where: str) -> frozenset[int]:
    places: set[int] = set()
    for part in where.split(","):
        low, _, high = part.partition("-")
        numbers = [number for number in (low, high or low) if number.isascii() and number.isdecimal()]
        if len(numbers) != 2 or len(low + high) > 8 or int(numbers[0]) > int(numbers[1]):
            raise ConfigError(f"step={text!r}: behind the @ must stand places such as 2,5-7; correct it")
        places |= set(range(int(numbers[0]), int(numbers[1]) + 1))
    return frozenset(places)
