"""The verdict on random inputs, which must not depend on luck: a number that fails once is measured again, and better.

A check on random inputs is a random number. Where all checks of one draw pass, the emulator passes. Else every number
is measured on `AVERAGED` fresh draws, and the means decide, so the deviation that a verdict hangs on is four times
smaller. A trap breaks its limit on average, so the means refuse it as well.

Numbers that all pass have a mean that passes. So an honest emulator of which a draw fails with probability p is refused
with a probability below 16 p^2, whatever the numbers' distribution: a first draw has to fail, and one of the 16.
`bench/vetting.py` measures p over a corpus of honest packages: docs/results/vetting.md. The means of some hard models
lie at least six of their standard deviations within their limits, in `tests/emulator/test_vet_luck.py`.
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
