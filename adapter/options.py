"""The options of methods: scalars with a type and a range."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offsite.errors import ConfigError, nearest

Scalar = int | float | bool | str
Options = tuple[tuple[str, Scalar], ...]


@dataclass(frozen=True)
class Option:
    """One scalar that a method takes.

    Attributes:
      name: name of the option; for a method of peft, the field of peft's configuration.
      default: value for a spec without this option; the option has the type of the default.
      low, high: bounds of the value, both included; for numbers only.
      choices: all allowed values; for words only.
    """

    name: str
    default: Scalar
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    def read(self, value: Scalar, method: str) -> Scalar:
        """Returns a value after a check of its type and range; a whole number counts as a float.

        Raises:
          ConfigError: the value has another type, or is outside the range.
        """
        kind = type(self.default)
        if kind is float and type(value) is int and self.low <= value <= self.high:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"{self.name}={value!r}: method {method!r} needs a value of type {kind.__name__}")
        if isinstance(value, str) and value not in self.choices:
            raise ConfigError(f"{self.name}={value!r}: method {method!r} takes one of {', '.join(self.choices)}")
        if kind is not bool and isinstance(value, int | float) and not self.low <= value <= self.high:
            raise ConfigError(f"{self.name}={value}: method {method!r} needs a value in {self.low:g}..{self.high:g}")
        return value


def resolve(options: Options, known: Sequence[Option], method: str) -> Mapping[str, Scalar]:
    """Returns the value of every option of a method: the spec's value, or else the default.

    Raises:
      ConfigError: a name is not an option of the method, or a value has the wrong type or is out of range.
    """
    table = {option.name: option for option in known}
    for name, _ in options:
        if name not in table:
            hint = nearest(name, list(table)) if table else "the method takes no options"
            raise ConfigError(f"option={name!r} is not an option of method {method!r}; {hint}")
    chosen = dict(options)
    return {name: option.read(chosen.get(name, option.default), method) for name, option in table.items()}
