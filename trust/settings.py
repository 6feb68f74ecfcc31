"""A flat TOML file into a frozen dataclass, strictly: an unknown key names the nearest known one."""

import dataclasses
import json
import tomllib
import types
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from offsite.errors import ConfigError, nearest
from offsite.trust.files import read

T = TypeVar("T")


def read_settings(path: Path, kind: type[T]) -> T:
    """Reads a file whose keys are the fields of `kind`; no tables but of texts, no repair.

    Raises:
      DataError: no such file.
      ConfigError: not TOML, an unknown or missing key, or a wrong type.
    """
    try:
        content = tomllib.loads(read(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"path={str(path)!r} is not valid TOML ({error}); correct that line") from error
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    for key in content:
        if key not in fields:
            raise ConfigError(f"{path.name} key {key} is not known; {nearest(key, list(fields))}")
    for name, one in fields.items():
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and name not in content:
            raise ConfigError(f"{path.name} key {name} is missing; add it")
    return kind(**{key: _value(hints[key], value, f"{path.name} key {key}") for key, value in content.items()})


def quote(value: str) -> str:
    """Returns a text as a TOML string."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):  # a key that may be left out
        hint = get_args(hint)[0]
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}={value!r}: must be a table")
        return {name: _value(get_args(hint)[1], one, f"{where}.{name}") for name, one in value.items()}
    if isinstance(hint, types.GenericAlias):
        if not isinstance(value, list):
            raise ConfigError(f"{where}={value!r}: must be a list")
        return tuple(_value(get_args(hint)[0], one, where) for one in value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where}={value!r}: must be of type {hint.__name__}")
    return value
