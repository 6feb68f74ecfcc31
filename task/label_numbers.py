"""The meaning of a number as a label: its place among the model's labels, or a name that is or holds this number.

The number 1, the number 1.0 and the texts "1" and "1.0" are one value, whatever the file's format, and so have one
meaning. Where names are numbers in another order than the places, a number could mean two labels; no record can tell
which of both, so a guess would teach a site other labels than its neighbours.
"""

import re
from collections.abc import Sequence

LONGEST = 9  # digits of a number
_WRITTEN = re.compile(r"(?:-?[1-9][0-9]{0,8}|0)(?:\.0+)?")  # how a file writes a whole number
_NAMED = re.compile(r"([+-]?[0-9]{1,9})(?:\.0+)?")  # how a name may write one, as "01"
_INSIDE = re.compile(r"[0-9]+")


def whole(value: object) -> int | None:
    """Returns the whole number that a value is, as 1, 1.0, "1" or "1.0"; None for another value, also a boolean."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        return int(value.partition(".")[0]) if _WRITTEN.fullmatch(value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


class LabelNumbers:
    """Looks up labels by numbers.

    Where every name is a number, a number means a name, unless the names are the places in another order. Elsewhere a
    number means a place, and has a second reading where another label's name is this number, or holds it as "2 stars".

    Args:
      names: names of the labels in the order of the model's outputs.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        written = [_NAMED.fullmatch(name) for name in names]
        values = [None if match is None else int(match.group(1)) for match in written]
        distinct = None not in values and len(set(values)) == len(values)
        self._only_names = distinct and set(values) != set(range(len(names)))
        self._inside = not any(written)  # the numbers are only parts of the names
        self._named = _places_by_value(_numbers_inside(names) if self._inside else values)

    def place(self, number: int) -> int | str | None:
        """Returns the place of the label that a number means; None for no label, and a rule for two readings."""
        if self._only_names:
            return self._named.get(number, [None])[0]
        readings = self._readings(number)
        if len(readings) > 1:
            return self._ambiguous()
        return readings[0] if readings else None

    def _readings(self, number: int) -> list[int]:
        place = [number] if 0 <= number < len(self._names) else []
        named = [] if self._inside and not place else self._named.get(number, [])
        return sorted({*place, *named})

    def _ambiguous(self) -> str:
        """Returns the rule about numbers with two readings; its example is from the model, and not from a record."""
        number = min(number for number in self._named if len(self._readings(number)) > 1)
        shown = " or ".join(f"{self._names[place][:24]!r} in place {place}" for place in self._readings(number)[:2])
        return (
            f"must not be a number: here {number} could mean {shown}, by name or by place; say what each number means "
            f'in the key labels of site.toml, or data.labels of the federation file, as {{ {number} = "NAME" }}'
        )


def _numbers_inside(names: Sequence[str]) -> list[int | None]:
    """Returns the number in each name, as in "2 stars"; nothing where a name has none or several, or two have one."""
    numbers = [_INSIDE.findall(name) for name in names]
    if any(len(digits) != 1 or len(digits[0]) > LONGEST for digits in numbers):
        return []
    values = [int(digits[0]) for digits in numbers]
    return list(values) if len(set(values)) == len(values) else []


def _places_by_value(values: Sequence[int | None]) -> dict[int, list[int]]:
    places = dict[int, list[int]]()
    for place, value in enumerate(values):
        if value is not None:
            places.setdefault(value, []).append(place)
    return places
