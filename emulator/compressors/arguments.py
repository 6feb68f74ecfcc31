"""Readers of compressors' arguments: one reader for each kind, with the same refusals everywhere."""

from fractions import Fraction

from offsite.emulator.package.quantization_scheme import FINE, Scheme
from offsite.errors import ConfigError

DEFAULT_GROUP = 64


def no_argument(name: str, argument: str) -> None:
    """Refuses any argument, for a compressor that takes none.

    Raises:
      ConfigError: the argument is not empty.
    """
    if argument:
        raise ConfigError(f"{name}={argument!r}: the compressor takes no argument; write {name}")


def fraction(name: str, argument: str, what: str, maximum: Fraction = Fraction(1)) -> Fraction:
    """Returns an argument as a fraction in (0, maximum].

    Args:
      name: name of the compressor.
      argument: text of the argument.
      what: meaning of the fraction, for the message.
      maximum: largest fraction.

    Raises:
      ConfigError: the argument is not such a fraction.
    """
    try:
        value = Fraction(argument)
    except (ValueError, ZeroDivisionError):
        value = Fraction(-1)
    if not 0 < value <= maximum:
        raise ConfigError(f"{name}={argument!r}: {what} must lie in (0, {maximum}]; write {name}:0.25")
    return value


def whole(name: str, argument: str, what: str, low: int, high: int) -> int:
    """Returns an argument as a whole number in low..high.

    Args:
      name: name of the compressor.
      argument: text of the argument.
      what: meaning of the number, for the message.
      low: smallest number.
      high: largest number.

    Raises:
      ConfigError: the argument is not such a number.
    """
    if not (argument.isascii() and argument.isdecimal() and len(argument) < 10 and low <= int(argument) <= high):
        raise ConfigError(
            f"{name}={argument!r}: {what} must be a whole number in {low}..{high}; write {name}:{max(low, 64)}"
        )
    return int(argument)


def scheme(name: str, bits: int, argument: str) -> Scheme:
    """Returns the scheme of a quantiser's argument; without an argument, groups of 64.

    Args:
      name: name of the quantiser, without its bits.
      bits: width of a code: 3, 4 or 8.
      argument: size of a group, for example "64", or "32/6" with fine scales.

    Raises:
      ConfigError: the group is not a whole number in 2..4096, or codes of 8 bits have fine scales.
    """
    length = argument.removesuffix(FINE)
    group = whole(f"{name}{bits}", length, "the group", 2, 4096) if argument else DEFAULT_GROUP
    return Scheme(bits, group, fine=argument.endswith(FINE))
