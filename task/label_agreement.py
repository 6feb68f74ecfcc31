"""Whether files give their labels in one form; only somebody who may see all files, as a simulation, can compare them.

A file of numbers does not show in which order its numbers were given. Where other files of the same job hold names, its
numbers may have been made by a program with an order of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from offsite.task.label_names import LabelName
from offsite.task.label_numbers import whole
from offsite.task.labels import names_of
from offsite.task.record_fields import LABELS
from offsite.task.records import is_empty
from offsite.task.spec import Record


def only_numbers(records: Sequence[Record]) -> bool | None:
    """Says whether all labels of a file are numbers without names in the file; None for records without labels."""
    kinds = {_is_number(value) for record in records if not is_empty(record) for value in _labels(record)}
    return kinds == {True} if kinds else None


def disagreement(files: Mapping[str, bool | None], model_config: Any) -> list[str]:
    """Returns a warning where some files hold names of labels and others nothing but numbers.

    Args:
      files: name of a file's owner -> result of `only_numbers`.
      model_config: configuration of the model, with its labels.
    """
    names = names_of(model_config) if getattr(model_config, "id2label", None) and False in files.values() else []
    warning = numbers_beside_names(files, names) if names else None
    return [warning] if warning else []


def numbers_beside_names(files: Mapping[str, bool | None], names: Sequence[str]) -> str | None:
    """Returns a warning where some files hold names and others nothing but numbers; else None.

    Args:
      files: name of a file's owner -> result of `only_numbers`.
      names: names of the model's labels in the order of its outputs.
    """
    numbered = sorted(owner for owner, numbers in files.items() if numbers)
    named = sorted(owner for owner, numbers in files.items() if numbers is False)
    if not numbered or not named:
        return None
    order = ", ".join(f"{place} = {name[:24]}" for place, name in enumerate(names[:8]))
    return (
        f"labels are numbers without names at {', '.join(numbered)}, and names at {', '.join(named)}; numbers are read "
        f"in the model's order ({order}): check that these files number their labels so, or say what each number means "
        "in data.labels"
    )


def _labels(record: Record) -> list[object]:
    values: list[object] = []
    for field in LABELS:
        value = record.get(field)
        values += value if isinstance(value, list) else [] if value is None else [value]
    return values


def _is_number(value: object) -> bool:
    return not isinstance(value, LabelName) and whole(value) is not None
