"""The verdict on random inputs, which must not depend on luck: a number that fails once is measured again, and better.

A check on random inputs is a random number. Where all checks of one draw pass, the emulator passes. Else every number
is measured on `AVERAGED` fresh draws, and the means decide, so the deviation that a verdict hangs on is four times
smaller. A trap breaks its limit on average, so the means refuse it as well. An honest emulator is refused by luck only
if a draw fails and then a mean does: a mean that lies z of its standard deviations inside its limit fails with the
probability 1 - Phi(z), below 1e-8 for z = 6. `tests/emulator/test_vet_luck.py` measures z over honest emulators.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from offsite.emulator.vetting.limits import Check, passed

AVERAGED = 16


def decided(draw: Callable[[], Iterable[Check]]) -> tuple[Check, ...]:
    """Returns the checks that decided for the emulator: those of one draw, or the means of many.

    Args:
      draw: function that returns the checks on fresh random inputs, passed or not; always of the same numbers.

    Raises:
      UnsupportedModel: the mean of a number does not keep to its limit.
    """
    once = tuple(draw())
    if all(check.passed for check in once):
        return once
    return tuple(passed(_means([tuple(draw()) for _ in range(AVERAGED)])))


def _means(draws: list[tuple[Check, ...]]) -> list[Check]:
    """Returns each check with the mean of its number and of its limit; a number that is not finite stays so."""
    found: dict[tuple[str, str], list[Check]] = {}
    for checks in draws:
        for check in checks:
            found.setdefault((check.name, check.where), []).append(check)
    return [
        replace(
            same[0],
            value=math.fsum(check.value for check in same) / len(same) if _finite(same) else math.nan,
            limit=math.fsum(check.limit for check in same) / len(same),
        )
        for same in found.values()
    ]


def _finite(checks: list[Check]) -> bool:
    return all(math.isfinite(check.value) for check in checks)
