"""The labels of a model: exactly the names in its configuration, and the numbers that can mean only one of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from offsite.errors import UnsupportedModel, nearest
from offsite.task.label_names import LabelName, composed, plain
from offsite.task.label_numbers import LabelNumbers, whole
from offsite.task.records import LenientRecords, fault
from offsite.task.spec import Record

IGNORED = -100  # in the place of a label that is not scored
HINTS = 100  # faults of a job's records with a hint, since the search for the nearest of many names takes time
_SHOWN = 24  # characters of a name in a message


def names_of(model_config: Any) -> list[str]:
    """Returns the names of a model's labels in the order of its outputs.

    Raises:
      UnsupportedModel: the model has fewer than two labels, predicts numbers or several labels at once, or its two
        tables contradict each other.
    """
    table = {int(number): str(name) for number, name in (getattr(model_config, "id2label", None) or {}).items()}
    kind = getattr(model_config, "problem_type", None)
    if kind not in (None, "single_label_classification"):
        raise UnsupportedModel(
            f"problem_type={kind!r} must be 'single_label_classification'; save the model with num_labels and id2label"
        )
    names = [composed(table[number]) for number in range(len(table)) if number in table]
    if len(table) < 2 or len(names) != len(table) or len(set(names)) != len(names):
        raise UnsupportedModel(
            f"id2label has {len(table)} labels, must have two or more different names, numbered from 0; write them "
            "into the model's config.json"
        )
    _check_reverse(names, getattr(model_config, "label2id", None))
    return names


def _check_reverse(names: Sequence[str], numbers: Any) -> None:
    """Refuses a label2id that numbers a name otherwise than id2label; the names of a default are no names of labels."""
    for name, number in numbers.items() if isinstance(numbers, Mapping) else ():
        label = composed(str(name))
        if label in names and whole(number) != names.index(label):
            raise UnsupportedModel(
                f"label={label[:_SHOWN]!r} has the number {names.index(label)} in id2label and another in label2id; "
                "correct the model's config.json"
            )


class Labels:
    """Looks up the labels of a model.

    Args:
      model_config: configuration of the model, with its id2label.

    Attributes:
      names: names of the labels in the order of the model's outputs.
    """

    def __init__(self, model_config: Any) -> None:
        self.names = names_of(model_config)
        self._places = {name: place for place, name in enumerate(self.names)}
        self._numbers = LabelNumbers(self.names)

    def number(self, value: object) -> int | None:
        """Returns the number of a label that is given by name or number; None where the value means no label, or two.

        See `task.label_numbers` for the meaning of a number, and of a text that is a number. A boolean means the label
        that is named true or false.
        """
        place = self._place(value)
        return place if isinstance(place, int) else None

    def of(self, records: Sequence[Record], field: str) -> list[int]:
        """Returns the number of each record's label; `IGNORED` for an unknown label in `LenientRecords`.

        Raises:
          DataError: a record's label is not a label of the model, and the records are not `LenientRecords`; the message
            names the record's place.
        """
        return [self._known(records, index, field, record[field]) for index, record in enumerate(records)]

    def lists_of(self, records: Sequence[Record], field: str) -> list[list[int]]:
        """Returns the numbers of each record's list of labels; raises as `of`."""
        return [
            [self._known(records, index, field, value) for value in record[field]]
            for index, record in enumerate(records)
        ]

    def _known(self, records: Sequence[Record], index: int, field: str, value: object) -> int:
        place = self._place(value)
        if isinstance(place, int):
            return place
        hinted = not isinstance(records, LenientRecords) or len(records.faults) < HINTS
        fault(records, index, field, place or self._unknown(value, hinted=hinted))
        return IGNORED

    def _place(self, value: object) -> int | str | None:
        """Returns the place of a label, None for no label, or the rule that a value with two meanings breaks."""
        if isinstance(value, LabelName):
            return self._named(value)
        if (number := whole(value)) is not None:
            return self._numbers.place(number)
        if isinstance(value, str) and (place := self._places.get(composed(value))) is not None:
            return place
        return self._truth(value)

    def _named(self, label: LabelName) -> int | str | None:
        place, others = self._places.get(label), self._inner_labels(label)
        if place is not None and others:
            return (
                f"could be {str(label)[:_SHOWN]!r} or {others[0][:_SHOWN]!r}, because folders of both names hold the "
                "image; move the images of each class into one folder, with no other class in it"
            )
        return place

    def _inner_labels(self, label: LabelName) -> list[str]:
        return [name for name in map(composed, label.inner) if name in self._places and name != label]

    def _truth(self, value: object) -> int | None:
        """Returns the place of the only label that is named true or false, in any case of letters, as the value is."""
        word = value if isinstance(value, str) else str(value) if isinstance(value, bool) else ""
        if word.casefold() not in ("true", "false"):
            return None
        alike = [place for name, place in self._places.items() if name.casefold() == word.casefold()]
        return alike[0] if len(alike) == 1 else None

    def _unknown(self, value: object, *, hinted: bool) -> str:
        """Returns the rule for a value that is no label; for a text it names the nearest label, and not the text."""
        shown = ", ".join(name[:_SHOWN] for name in self.names[:8])
        named = f"{value.source}={str(value)!r} " if isinstance(value, LabelName) and value.shown else ""
        return (
            f"{named}must be one of the model's {len(self.names)} labels ({shown}); "
            f"{self._hint(value) if hinted else ''}correct it, or the model's id2label"
        )

    def _hint(self, value: object) -> str:
        if isinstance(value, LabelName) and (inner := self._inner_labels(value)):
            return f"the folder {inner[0][:_SHOWN]!r} in it is one, so give this folder as the data; "
        if isinstance(value, str) and (alike := self._alike(plain(value))):
            return f"did you mean {' or '.join(alike)}; case, spaces and invisible signs count; "
        if plain(str(value)) in ("true", "false"):
            return "a boolean is read by name, and no label is named true or false; "
        if not isinstance(value, str):
            return ""
        hint = nearest(value, self.names)
        return f"{hint}; " if hint.startswith("did you mean") else ""

    def _alike(self, word: str) -> list[str]:
        """Returns the labels whose names look like a word, or the one that the word means as a number."""
        named = [name for name in self.names if plain(name) == word]
        place = None if named or whole(word) is None else self._place(word)
        return [self.names[place]] if isinstance(place, int) else named
