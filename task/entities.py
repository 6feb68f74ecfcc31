"""Entities of labelled words as spans, and the labels that make spans: the definition of seqeval, which is conlleval's.

A label is a place in an entity and the entity's type, as in B-PER. B and S begin an entity, E and S end it, and I goes
on; U and L are other letters for S and E, and M for I. Between two labels of different types an entity ends as well.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

OUTSIDE = "O"
_PLACED = re.compile(r"([BIMELSU])[-_](.+)", re.DOTALL)
_PLACES = {"M": "I", "L": "E", "U": "S"}
Span = tuple[str, int, int]


@dataclass(frozen=True)
class Tagging:
    """The meaning of each label of a model: a place in an entity, and the type of the entity.

    Attributes:
      tags: (place, type) of each label in the order of the model's outputs; ("O", "") outside of all entities.
    """

    tags: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> "Tagging | None":
        """Returns the meaning of label names; None for labels that make no entities, for example parts of speech.

        The outside label is "O", or the only label without a place among labels with places; there may be none where
        every label has a place. Beside an "O", a label without a place stands for an entity of adjoining words.
        """
        placed = {name: match.groups() for name in names if (match := _PLACED.fullmatch(name))}
        others = [name for name in names if name not in placed]
        if OUTSIDE in others:
            outside = OUTSIDE
        elif placed and len(others) <= 1:
            outside = "".join(others)
        else:
            return None
        return cls(tuple(_tag(name, placed.get(name), outside) for name in names))

    def spans(self, labels: Sequence[int]) -> set[Span]:
        """Returns the entities of a record's words: type, first and last word.

        Args:
          labels: number of each word's label.
        """
        spans, begin, before = set[Span](), 0, (OUTSIDE, "")
        for number, now in enumerate([*(self.tags[label] for label in labels), (OUTSIDE, "")]):
            if _ends(before, now):
                spans.add((before[1], begin, number - 1))
            if _begins(before, now):
                begin = number
            before = now
        return spans


def _tag(name: str, placed: Sequence[str] | None, outside: str) -> tuple[str, str]:
    if name == outside:
        return OUTSIDE, ""
    place, kind = placed or ("I", name)
    return _PLACES.get(place, place), kind


def _ends(before: tuple[str, str], now: tuple[str, str]) -> bool:
    """Returns whether an entity ends between two neighbours."""
    if before[0] == OUTSIDE:
        return False
    return before[0] in "ES" or now[0] in "BSO" or before[1] != now[1]


def _begins(before: tuple[str, str], now: tuple[str, str]) -> bool:
    """Returns whether an entity begins between two neighbours."""
    if now[0] == OUTSIDE:
        return False
    return now[0] in "BS" or before[0] in "ESO" or before[1] != now[1]
