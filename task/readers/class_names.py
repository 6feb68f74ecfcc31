"""Names of labels in a table's own metadata, in which a file says what its numbers mean.

Two libraries write such names: `datasets`, as the type ClassLabel of a column, and Spark, for the numbers that its
StringIndexer made. Each file has an order of its own, so a number of one file says nothing about the model's labels.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offsite.errors import DataError
from offsite.task.label_names import LabelName

_DATASETS, _SPARK = b"huggingface", b"org.apache.spark.sql.parquet.row.metadata"
_NO_LABEL = -1  # how `datasets` writes a missing label
SOURCE = "name in the file's metadata"


class UnknownNumber:
    """Stands for a number that the file's own metadata give no name; no column takes this type."""


def class_names(path: Path, metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Returns the names of the labels of each column that has such names, by column; a nested column is `outer.inner`.

    Args:
      path: data file, for messages.
      metadata: metadata of an Arrow schema, as a Parquet or Arrow file holds them.

    Raises:
      DataError: the metadata are damaged.
    """
    held = metadata or {}
    info, fields = _json(path, held.get(_DATASETS)).get("info"), _json(path, held.get(_SPARK)).get("fields")
    features = info.get("features") if isinstance(info, Mapping) else None
    columns = dict(_spark_names(fields)) if isinstance(fields, list) else {}
    columns |= dict(_datasets_names("", features)) if isinstance(features, Mapping) else {}
    # A ClassLabel without names of its own is named by its numbers, which then are plain numbers.
    return {column: names for column, names in columns.items() if names != [str(at) for at in range(len(names))]}


def with_names(value: Any, names: list[str]) -> Any:
    """Returns the name of a number, as a `LabelName`, or the names of a list of numbers; texts stay as they are."""
    if isinstance(value, list):
        return [with_names(part, names) for part in value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # Spark writes such numbers as floating-point numbers
    if not isinstance(value, int) or isinstance(value, bool) or value == _NO_LABEL:
        return None if value == _NO_LABEL else value
    return LabelName(names[value], SOURCE) if 0 <= value < len(names) else UnknownNumber()


def _datasets_names(prefix: str, features: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yields the column and the names of each ClassLabel, also in lists, whose written form changed over the years."""
    for column, feature in features.items():
        inner = _without_lists(feature)
        names = inner.get("names")
        if inner.get("_type") == "ClassLabel" and isinstance(names, list):
            yield prefix + column, [str(name) for name in names]
        elif "_type" not in inner:
            yield from _datasets_names(f"{prefix}{column}.", inner)


def _without_lists(feature: Any) -> Mapping[str, Any]:
    """Returns the type of the values in lists: of `[type]`, or of `{"feature": type, "_type": "List"}`."""
    while isinstance(feature, list) or (isinstance(feature, Mapping) and {"feature", "_type"} <= feature.keys()):
        feature = feature["feature"] if isinstance(feature, Mapping) else next(iter(feature), None)
    return feature if isinstance(feature, Mapping) else {}


def _spark_names(fields: list[Any]) -> Iterator[tuple[str, list[str]]]:
    for field in fields:
        attributes = field.get("metadata", {}).get("ml_attr", {}) if isinstance(field, Mapping) else {}
        if isinstance(attributes.get("vals"), list):
            yield str(field["name"]), [str(name) for name in attributes["vals"]]


def _json(path: Path, content: bytes | None) -> Mapping[str, Any]:
    try:
        value = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        raise DataError(f"data={str(path)!r} has damaged metadata about its columns; write it again") from None
    return value if isinstance(value, Mapping) else {}
