"""The spec of an adapter: a method, its size, and the slots that carry the adapter."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from offsite.adapter.options import Options, Scalar
from offsite.errors import ConfigError, nearest

MAX_OPTIONS = 16
LONGEST_OPTION = 64  # characters of an option's name, and of a word that is its value
LARGEST_OPTION = 2**53  # a whole number up to here is the same as a float
MAX_RANK = 1 << 16
# Nothing honest lies outside, and no scale within makes a 32-bit number overflow or vanish.
MIN_ALPHA, MAX_ALPHA = 1e-9, 1e9


@dataclass(frozen=True)
class AdapterSpec:
    """The public description from which every party builds the same adapter.

    Attributes:
      method: a key of `adapter.methods.METHODS`.
      rank: inner width, from 1 to 65536; methods without an inner width ignore the rank.
      alpha: numerator of the scale alpha / rank that a method's effect is multiplied by, in [1e-9, 1e9]; methods
        without a scale ignore alpha.
      targets: leaf module names inside a slot ("q_proj"); () takes the method's default for the model.
      slots: paths of the blocks that carry the adapter, for example "model.layers.0".
      seed: public seed of every random initial value, 0 <= seed < 2**63.
      options: (name, value) pairs of the method's own options in `adapter.methods.METHODS`, sorted by name, each name
        once. Scalars only: the spec comes over the network, and must carry neither a path nor code.
    """

    method: str = "ffa_lora"
    rank: int = 2
    alpha: float = 4.0
    targets: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    seed: int = 0
    options: Options = ()

    def __post_init__(self) -> None:
        """Refuses values that no method can use."""
        if not 1 <= self.rank <= MAX_RANK:
            raise ConfigError(f"rank={self.rank!s:.24} must be from 1 to {MAX_RANK}; 2 is the default")
        if not MIN_ALPHA <= self.alpha <= MAX_ALPHA:
            raise ConfigError(
                f"alpha={self.alpha!s:.24} must be from {MIN_ALPHA:g} to {MAX_ALPHA:g}; twice the rank is usual"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must be in 0..2**63-1; choose another seed")
        for name, values in (("slots", self.slots), ("targets", self.targets)):
            if isinstance(values, str) or not all(isinstance(value, str) and value for value in values):
                raise ConfigError(f"{name}={values!r} must be a tuple of non-empty names; write one name per element")
            if len(set(values)) != len(values):
                raise ConfigError(f"{name}={values!r} names an element twice; remove one")
        _check_options(self.options)

    def to_dict(self) -> dict[str, object]:
        """Returns the JSON form: tuples become lists, options an object."""
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return lists | {"options": dict(self.options)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "AdapterSpec":
        """Returns the spec of a JSON object that has exactly the keys of `to_dict`.

        Raises:
          ConfigError: a key is unknown or missing, or a value has the wrong type.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"adapter key={key!r} is not known; {nearest(key, known)}")
        if missing := [key for key in known if key not in values]:
            raise ConfigError(f"adapter key={missing[0]!r} is missing; write all of {', '.join(known)}")
        return cls(
            method=_typed(values, "method", str),
            rank=_typed(values, "rank", int),
            alpha=_as_float(_typed(values, "alpha", int, float)),
            targets=tuple(_typed(values, "targets", list, tuple)),
            slots=tuple(_typed(values, "slots", list, tuple)),
            seed=_typed(values, "seed", int),
            options=tuple(sorted(_typed(values, "options", dict).items())),
        )


def _check_options(options: Options) -> None:
    """Checks the form of options; `adapter.methods.known` checks whether the method has them.

    Raises:
      ConfigError: there are too many options, the names are not sorted identifiers, or a value is not a scalar.
    """
    if len(options) > MAX_OPTIONS:
        raise ConfigError(f"options={len(options)} must be at most {MAX_OPTIONS}; no method has more")
    names = [name for name, _ in options]
    if not all(isinstance(name, str) and name.isidentifier() and len(name) <= LONGEST_OPTION for name in names):
        raise ConfigError("options: each name must be letters, digits and _; take the names from `offsite methods`")
    if names != sorted(set(names)):
        raise ConfigError(f"options={names} must be sorted by name, each once; sort them")
    for name, value in options:
        if not isinstance(value, Scalar):
            raise ConfigError(f"option {name}={type(value).__name__} must be a number, a word, true or false")
        if isinstance(value, str) and not (value.isidentifier() and len(value) <= LONGEST_OPTION):
            raise ConfigError(f"option {name}: a word must be letters, digits and _; no option takes a path")
        if not isinstance(value, str) and not -LARGEST_OPTION <= value <= LARGEST_OPTION:  # True for NaN
            raise ConfigError(f"option {name}={value!s:.24} must be within +-2**53; choose another value")


def _as_float(value: float) -> float:
    """Returns a number as a float; a whole number too large for a float stays, and is out of range anywhere."""
    return float(value) if -LARGEST_OPTION <= value <= LARGEST_OPTION else value


def _typed(values: Mapping[str, object], key: str, *kinds: type) -> Any:
    """Returns a value after a check of its JSON type; a bool does not count as a number."""
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"adapter {key}={value!r} must be of type {wanted}; correct it")
    return value
