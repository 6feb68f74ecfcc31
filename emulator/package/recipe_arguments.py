"""The arguments of a recipe's steps: one table for all compressors, read without a model library.

A check before any work reads the same arguments as the compressors themselves.
"""

from collections.abc import Callable, Collection
from fractions import Fraction

from offsite.emulator.package.quantization_scheme import FINE, Scheme
from offsite.emulator.package.recipe import Step
from offsite.errors import ConfigError, lookup

DEFAULT_GROUP = 64
MAX_STEPS = 100_000
# Compressors whose argument is a fraction -> what the fraction is, and the largest fraction.
FRACTIONS = {
    "skip_uniform": ("the fraction skipped", Fraction(1)),
    "skip_importance": ("the fraction skipped", Fraction(1)),
    "skip_gradient": ("the fraction skipped", Fraction(1)),
    "share": ("the fraction that shares", Fraction(1)),
    "narrow": ("the fraction of channels kept", Fraction(1)),
    "lowrank": ("the fraction of weights kept", Fraction(1)),
    "prune": ("the fraction of zeros", Fraction(1, 2)),
}
_STAYS = (
    "in a parallel emulator every block carries an adapter and stays; use gptq4, lowrank or int8, or shape sandwich"
)
# Compressors that do not fit a parallel emulator -> the reason, and what to take.
NOT_PARALLEL = {
    **dict.fromkeys(("skip", "skip_uniform", "skip_importance", "skip_gradient"), _STAYS),
    "share": "blocks of a parallel emulator keep their own weights; use gptq4 or lowrank",
    "distill": "in a parallel emulator a block may only be stored in fewer bits; use gptq4",
    "narrow": (
        "in a parallel emulator the adapter's shapes would change; use lowrank, which keeps the shapes, or shape "
        "sandwich"
    ),
}


def check_recipe(recipe: tuple[str, ...], *, parallel: bool) -> None:
    """Checks the names and the arguments of a recipe's steps; whether they fit a model shows in the model alone.

    Args:
      recipe: compressors in order.
      parallel: whether the emulator's shape is parallel.

    Raises:
      UnknownName: there is no such compressor.
      ConfigError: an argument or a place is out of range, or a compressor does not fit the shape.
    """
    for text in recipe:
        step = Step.parse(text)
        lookup(ARGUMENTS, step.name, "compressor")(step)
        if parallel:
            refuse_parallel(step.name, step.argument)


def refuse_parallel(name: str, argument: str) -> None:
    """Refuses a compressor that does not fit a parallel emulator.

    Raises:
      ConfigError: the compressor is in `NOT_PARALLEL`.
    """
    if name in NOT_PARALLEL:
        raise ConfigError(f"{name}={argument!r}: {NOT_PARALLEL[name]}")


def check_places(step: Step, known: Collection[int]) -> None:
    """Checks the places of a step against the middle of a model.

    Args:
      step: the step.
      known: places of the blocks of the middle, counted from 0 in the tower.

    Raises:
      ConfigError: a place is not in the middle.
    """
    if step.places is not None and (wrong := sorted(step.places.difference(known))):
        raise ConfigError(
            f"step={str(step)!r}: place {wrong[0]} is not in the middle, which is {min(known)}-{max(known)}; correct it"
        )


def listed(step: Step) -> frozenset[int]:
    """Returns the places of a step that needs places and takes no argument.

    Raises:
      ConfigError: there is an argument, or no place.
    """
    if step.places is None or step.argument:
        raise ConfigError(f"{step.name}={str(step)!r}: {step.name} needs places and no argument; write skip@5,7-9")
    return step.places


def no_argument(name: str, argument: str) -> None:
    """Refuses any argument, for a compressor that takes none.

    Raises:
      ConfigError: the argument is not empty.
    """
    if argument:
        raise ConfigError(f"{name}={argument!r}: the compressor takes no argument; write {name}")


def fraction(name: str, argument: str) -> Fraction:
    """Returns an argument as a fraction in (0, the largest of `FRACTIONS`].

    Args:
      name: name of the compressor.
      argument: text of the argument.

    Raises:
      ConfigError: the argument is not such a fraction.
    """
    what, maximum = FRACTIONS[name]
    try:
        value = Fraction(argument)
    except (ValueError, ZeroDivisionError):
        value = Fraction(-1)
    if not 0 < value <= maximum:
        raise ConfigError(f"{name}={argument!r}: {what} must lie in (0, {maximum}]; write {name}:0.25")
    return value


def steps_of(name: str, argument: str) -> int:
    """Returns an argument as a number of steps.

    Raises:
      ConfigError: the argument is not a whole number, or out of range.
    """
    return whole(name, argument, "the number of steps", 1, MAX_STEPS)


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


def _none(step: Step) -> None:
    no_argument(step.name, step.argument)


def _share(step: Step) -> Fraction:
    return fraction(step.name, step.argument)


def _quantiser(name: str, bits: int) -> Callable[[Step], object]:
    return lambda step: scheme(name, bits, step.argument)


# Each compressor of `emulator.compressors.COMPRESSORS`, in that order -> the reader of its steps.
ARGUMENTS: dict[str, Callable[[Step], object]] = {
    "skip": listed,
    **dict.fromkeys(("skip_uniform", "skip_importance", "skip_gradient", "share"), _share),
    "refit": _none,
    "patch": _none,
    "narrow": _share,
    "lowrank": _share,
    "center": _none,
    "distill": lambda step: steps_of("distill", step.argument),
    "prune": _share,
    "prune_2_4": _none,
    **{f"int{bits}": _quantiser("int", bits) for bits in (8, 4, 3)},
    **{f"gptq{bits}": _quantiser("gptq", bits) for bits in (8, 4, 3)},
}
