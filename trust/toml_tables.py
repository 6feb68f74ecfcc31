"""TOML tables as frozen dataclasses, strictly: an unknown key names the nearest known key, nothing is repaired."""

import dataclasses
import json
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from offsite.errors import ConfigError, nearest
from offsite.trust.files import read

T = TypeVar("T")
_EXACT = 2**53  # a whole number up to here is the same as a float


def read_settings(path: Path, kind: type[T], *, removed: Mapping[str, str] | None = None) -> T:
    """Reads a TOML file whose keys are the fields of a dataclass.

    Args:
      path: TOML file, UTF-8.
      kind: dataclass of the settings; a field without a default is a required key.
      removed: next step of the owner, by key that earlier releases knew.

    Raises:
      DataError: the file is missing.
      ConfigError: the file is not TOML, or a key is removed, unknown, missing or of a wrong type.
    """
    try:
        content = tomllib.loads(read(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"path={str(path)!r} is not valid TOML ({error}); correct that line") from error
    for key, step in (removed or {}).items():
        if key in content:
            raise ConfigError(f"{path.name} key {key} is no longer known: {step}")
    return TableReader(path.name, f"{path.name} key ").table(kind, content)


def quote(value: str) -> str:
    """Returns a text as a TOML string."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


@dataclass(frozen=True)
class TableReader:
    """Makes dataclasses of parsed tables.

    Attributes:
      source: name of the document, with which messages about unknown and missing keys begin.
      before: text in front of a key in messages about values.
    """

    source: str
    before: str = ""

    def table(self, kind: type[T], content: Any, where: str = "") -> T:
        """Returns an instance of a dataclass; its fields may be dataclasses, tuples and dictionaries of values.

        Args:
          kind: dataclass of the table.
          content: parsed table, a mapping from key to value.
          where: path of the table in its document, with a final dot; empty for the document itself.

        Raises:
          ConfigError: a key is unknown, missing or of a wrong type.
        """
        if not isinstance(content, Mapping):
            path = where.rstrip(".")
            if isinstance(content, list) and all(isinstance(item, Mapping) for item in content):
                step = f"write [{path}], with single brackets"
                raise ConfigError(f"{self.before}[[{path}]]: must be one table; {step}", key=path)
            raise ConfigError(f"{self.before}{path}={content!r}: must be a table of keys", key=path)
        hints, fields = get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
        for key in content:
            if key not in fields:
                hint = nearest(key, list(fields))
                raise ConfigError(f"{self.source} key {where}{key} is not known; {hint}", key=where + key)
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in content:
                raise ConfigError(f"{self.source} key {where}{name} is missing; add it")
        return kind(**{key: self._value(hints[key], value, where + key) for key, value in content.items()})

    def _value(self, hint: Any, value: Any, where: str) -> Any:
        if isinstance(hint, types.UnionType) and type(None) in get_args(hint):  # a key that may be left out
            return None if value is None else self._value(get_args(hint)[0], value, where)
        if dataclasses.is_dataclass(hint):
            return self.table(hint, value, f"{where}.")  # type: ignore[arg-type]
        shown = f"{self.before}{where}={value!r}"
        if get_origin(hint) is dict:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{shown}: must be a table", key=where)
            return {name: self._value(get_args(hint)[1], item, f"{where}.{name}") for name, item in value.items()}
        if isinstance(hint, types.GenericAlias):
            if isinstance(value, Mapping) and dataclasses.is_dataclass(get_args(hint)[0]):
                step = f"write [[{where}]], with double brackets, above each"
                raise ConfigError(f"{self.before}[{where}]: must be a list of tables; {step}", key=where)
            if not isinstance(value, list):
                raise ConfigError(f"{shown}: must be a list", key=where)
            return tuple(self._value(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if hint is float and type(value) is int and abs(value) <= _EXACT:  # a larger number is of a wrong type
            return float(value)
        kinds = get_args(hint) or (hint,)
        if type(value) not in kinds:
            raise ConfigError(f"{shown}: must be of type {' or '.join(kind.__name__ for kind in kinds)}", key=where)
        return value
