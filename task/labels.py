"""The labels of a model: exactly the names and numbers in its configuration."""

from collections.abc import Sequence
from typing import Any

from offsite.errors import UnsupportedModel
from offsite.task.records import fault
from offsite.task.spec import Record

IGNORED = -100  # in the place of a label that is not scored


def names_of(model_config: Any) -> list[str]:
    """Returns the names of a model's labels in the order of its outputs.

    Raises:
      UnsupportedModel: the model has fewer than two labels, or predicts numbers or several labels at once.
    """
    table = {int(number): str(name) for number, name in (getattr(model_config, "id2label", None) or {}).items()}
    kind = getattr(model_config, "problem_type", None)
    if kind not in (None, "single_label_classification"):
        raise UnsupportedModel(
            f"problem_type={kind!r} must be 'single_label_classification'; save the model with num_labels and id2label"
        )
    if len(table) < 2 or sorted(table) != list(range(len(table))) or len(set(table.values())) != len(table):
        raise UnsupportedModel(
            f"id2label has {len(table)} labels, must have two or more different names, numbered from 0; write them "
            "into the model's config.json"
        )
    return [table[number] for number in range(len(table))]


class Labels:
    """Looks up the labels of a model.

    Args:
      model_config: configuration of the model, with its id2label.

    Attributes:
      names: names of the labels in the order of the model's outputs.
    """

    def __init__(self, model_config: Any) -> None:
        self.names = names_of(model_config)
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def number(self, value: object) -> int | None:
        """Returns the number of a label that is given by name or number; None where the model has no such label.

        Names take precedence: the text "1" means a label named "1" where there is such a label.
        """
        if isinstance(value, bool):
            value = int(value)
        if isinstance(value, str):
            if value in self._numbers:
                return self._numbers[value]
            if not (value.isascii() and value.isdecimal() and len(value) < 10):
                return None
            value = int(value)
        return value if isinstance(value, int) and 0 <= value < len(self.names) else None

    def of(self, records: Sequence[Record], field: str) -> list[int]:
        """Returns the number of each record's label; `IGNORED` for an unknown label in `LenientRecords`.

        Raises:
          DataError: a record's label is not a label of the model, and the records are not `LenientRecords`; the message
            names the record's place.
        """
        numbers = [self.number(record[field]) for record in records]
        return [self._known(records, index, field, number) for index, number in enumerate(numbers)]

    def lists_of(self, records: Sequence[Record], field: str) -> list[list[int]]:
        """Returns the numbers of each record's list of labels; raises as `of`."""
        return [
            [self._known(records, index, field, self.number(value)) for value in record[field]]
            for index, record in enumerate(records)
        ]

    def _known(self, records: Sequence[Record], index: int, field: str, number: int | None) -> int:
        if number is None:
            shown = ", ".join(name[:24] for name in self.names[:8])
            rule = f"must be one of the model's {len(self.names)} labels ({shown}); correct it, or the model's id2label"
            fault(records, index, field, rule)
            return IGNORED
        return number
