"""Frozen dataclasses as JSON objects and back: the fields are the keys."""

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from offsite.errors import DataError

T = TypeVar("T")
_EXACT = 2**53  # a whole number up to here is the same as a float
OMITTED = types.MappingProxyType({"omitted": True})
"""Metadata of a field whose key is left out where its value is None."""


def encode(value: object) -> Any:
    """Returns a value in its JSON form: dataclasses and mappings as objects, tuples and lists as arrays."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: encode(own) for field, own in pairs if own is not None or "omitted" not in field.metadata}
    if isinstance(value, Mapping):
        return {str(key): encode(own) for key, own in value.items()}
    if isinstance(value, tuple | list):
        return [encode(own) for own in value]
    return value


def decode(kind: type[T], content: object, where: str = "") -> T:
    """Returns the dataclass whose JSON form is given.

    A key without a field is passed over, since a later release may write more keys.

    Args:
      kind: the dataclass; a field without a default is a required key.
      content: the parsed JSON.
      where: name of the object in messages.

    Raises:
      DataError: a key is missing, or a value is of another type.
    """
    if not isinstance(content, Mapping):
        raise DataError(f"{where or kind.__name__}={content!r}: must be an object; restore the file")
    hints, known = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        place = f"{where}.{field.name}".lstrip(".")
        if field.name in content:
            known[field.name] = _value(hints[field.name], content[field.name], place)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise DataError(f"{place}: the key is missing; restore the file")
    return kind(**known)


def _value(hint: Any, value: Any, where: str) -> Any:
    """Returns a JSON value in the form of its field."""
    inner = get_args(hint)
    if get_origin(hint) is types.UnionType and inner[1:] == (types.NoneType,):
        return None if value is None else _value(inner[0], value, where)
    if dataclasses.is_dataclass(hint):
        return decode(hint, value, where)  # type: ignore[arg-type]
    if get_origin(hint) is tuple and isinstance(value, list):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        pairs = enumerate(zip(kinds, value, strict=len(kinds) == len(value)))
        return tuple(_value(kind, own, f"{where}[{i}]") for i, (kind, own) in pairs)
    if get_origin(hint) is Mapping and isinstance(value, Mapping):
        return {key: _value(inner[1], own, f"{where}.{key}") for key, own in value.items()}
    return _plain(hint, value, where)


def _plain(hint: Any, value: Any, where: str) -> Any:
    """Returns a text, a number or a truth value; a number that JSON cannot hold was written as null."""
    if hint is float and value is None:
        return math.nan
    if hint is float and type(value) is int and abs(value) <= _EXACT:  # a larger number is of another type
        return float(value)
    if hint is not object and type(value) not in (get_args(hint) or (hint,)):
        raise DataError(f"{where}={value!r}: is of another type; restore the file")
    return value
