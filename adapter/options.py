"""The scalars of their own that methods take, and their ranges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offsite.errors import ConfigError, nearest

Scalar = int | float | bool | str
Options = tuple[tuple[str, Scalar], ...]


@dataclass(frozen=True)
class Option:
    """One scalar that a method takes.

    Attributes:
      name: of the option; for a method of peft, of the field of its configuration.
      default: value where a spec names none; its type is the option's.
      low, high: ends of the range, both included; for numbers only.
      choices: the values there are, for words only.
    """

    name: str
    default: Scalar
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    def read(self, value: Scalar, method: str) -> Scalar:
        """Returns a value after a check of its type and range; a whole number is taken for a float.

        Raises:
          ConfigError: it is of another type, or outside the range.
        """
        kind = type(self.default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"{self.name}={value!r}: method {method!r} needs a value of type {kind.__name__}")
        if isinstance(value, str) and value not in self.choices:
            raise ConfigError(f"{self.name}={value!r}: method {method!r} knows {', '.join(self.choices)}")
        if kind in (int, float) and not self.low <= float(value) <= self.high:
            raise ConfigError(f"{self.name}={value}: method {method!r} needs one in {self.low:g}..{self.high:g}")
        return value


def resolve(options: Options, known: Sequence[Option], method: str) -> Mapping[str, Scalar]:
    """Returns the value of every option of a method: the spec's, or else the default.

    Raises:
      ConfigError: a name is no option of the method, or a value is not of its type or range.
    """
    table = {option.name: option for option in known}
    for name, _ in options:
        if name not in table:
            hint = nearest(name, list(table)) if table else "it takes none"
            raise ConfigError(f"option={name!r} is not one of method {method!r}; {hint}")
    given = dict(options)
    return {name: option.read(given.get(name, option.default), method) for name, option in table.items()}
