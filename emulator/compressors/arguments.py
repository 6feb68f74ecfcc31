"""The arguments of compressors: read once, refused with the same words everywhere."""

from fractions import Fraction

from offsite.emulator.package.quantization_scheme import FINE, Scheme
from offsite.errors import ConfigError

DEFAULT_GROUP = 64


def no_argument(name: str, argument: str) -> None:
    """Refuses an argument where none is understood.

    Raises:
      ConfigError: there is one.
    """
    if argument:
        raise ConfigError(f"{name}={argument!r}: it takes no argument; write {name}")


def fraction(name: str, argument: str, what: str, most: Fraction = Fraction(1)) -> Fraction:
    """Returns an argument as a fraction in (0, most].

    Raises:
      ConfigError: it is none.
    """
    try:
        value = Fraction(argument)
    except (ValueError, ZeroDivisionError):
        value = Fraction(-1)
    if not 0 < value <= most:
        raise ConfigError(f"{name}={argument!r}: {what} must lie in (0, {most}]; write {name}:0.25")
    return value


def whole(name: str, argument: str, what: str, low: int, high: int) -> int:
    """Returns an argument as a whole number in low..high.

    Raises:
      ConfigError: it is none.
    """
    if not (argument.isascii() and argument.isdecimal() and len(argument) < 10 and low <= int(argument) <= high):
        raise ConfigError(
            f"{name}={argument!r}: {what} must be a whole number in {low}..{high}; write {name}:{max(low, 64)}"
        )
    return int(argument)


def scheme(name: str, bits: int, argument: str) -> Scheme:
    """Returns how a quantiser of so many bits stores: groups of 64 where nothing is given.

    Args:
      name: of the quantiser, without its bits.
      bits: 3, 4 or 8.
      argument: "64", or "32/6" for fine scales.

    Raises:
      ConfigError: the group is not a whole number in 2..4096, or fine scales are none for so many bits.
    """
    length = argument.removesuffix(FINE)
    group = whole(f"{name}{bits}", length, "the group", 2, 4096) if argument else DEFAULT_GROUP
    return Scheme(bits, group, fine=argument.endswith(FINE))
