"""Names of labels: one Unicode form for all, and labels that were given by name, whose digits are no number."""

import unicodedata
from collections.abc import Mapping
from typing import Any

from offsite.task.label_numbers import whole


class LabelName(str):
    """A label that is given by its name: by a folder, by a file's own metadata or by the table `labels`.

    Attributes:
      source: origin of the name, for messages; for example `folder`.
      shown: whether a message may show the name, because it is no record's content.
      inner: names of the folders between the class's folder and the image, which may be names of labels as well.
    """

    source: str
    shown: bool
    inner: tuple[str, ...]

    def __new__(
        cls, name: str, source: str = "label", *, shown: bool = False, inner: tuple[str, ...] = ()
    ) -> "LabelName":
        """Returns a name in Unicode's composed form."""
        label = super().__new__(cls, composed(name))
        label.source, label.shown, label.inner = source, shown, inner
        return label


def composed(name: str) -> str:
    """Returns a name in Unicode's composed form (NFC); macOS writes the names of folders in the decomposed form."""
    return unicodedata.normalize("NFC", name)


def by_table(value: Any, table: Mapping[str, str]) -> Any:
    """Returns the label that a table gives to a value, or the labels of a list; any other value of a file is a name.

    Args:
      value: value of a data file; one that is no text, number or boolean stays as it is.
      table: value as a text -> name of the label; the numbers 1 and 1.0 and the text "1" are one value.
    """
    if isinstance(value, list):
        return [by_table(part, table) for part in value]
    if not isinstance(value, str | int) and whole(value) is None:
        return value
    key = _key(value)
    keys = {_key(written): name for written, name in table.items()}
    if key in keys:
        return LabelName(keys[key], "labels", shown=True)
    return value if isinstance(value, LabelName) else LabelName(key, "value")


def _key(value: object) -> str:
    number = whole(value)
    if number is not None:
        return str(number)
    return composed(str(value).lower() if isinstance(value, bool) else str(value))


def plain(name: str) -> str:
    """Returns a name without what a person may not see: case, spaces around and doubled, invisible and wide signs."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    seen = "".join(sign for sign in folded if unicodedata.category(sign) not in ("Cf", "Cc") or sign.isspace())
    return " ".join(seen.split())
