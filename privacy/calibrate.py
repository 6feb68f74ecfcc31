"""From a target epsilon to the noise that meets it."""

import math
from collections.abc import Callable
from functools import lru_cache

from offsite.errors import ConfigError, PrivacyRefusal, lookup
from offsite.privacy.accountants import ACCOUNTANTS, NOISE_FLOOR, WHOLE_ORDERS, Accountant, bound_by_rdp, check_delta
from offsite.privacy.events import Event, check_sample_rate, check_steps

LARGEST_DELTA = 1e-6  # of any site, however few records it has
NOISE_CEILING = 1e4
TOLERANCE = 0.01
MAX_EVALUATIONS = 60

Point = tuple[float, float]  # noise multiplier, epsilon
Spent = Callable[[float], float]


def public_delta(n: int) -> float:
    """Returns the default delta of a site, min(1e-6, 1 / (100 n)).

    A mechanism may spend its delta on giving a whole record away, so over n records the sum of all deltas stays at or
    below 1/100.

    Args:
      n: number of records that the site has declared in public, >= 1; never a count taken from private data.

    Raises:
      ConfigError: n is below 1.
    """
    if n < 1:
        raise ConfigError(f"n={n} must be >= 1 record; add records, or correct the declared number")
    return min(LARGEST_DELTA, 1 / (100 * n))


def noise_multiplier_for(
    epsilon: float, delta: float, sample_rate: float, steps: int, *, accountant: str = "pld"
) -> float:
    """Returns the smallest noise multiplier that meets a target, found by a monotone bracketed search.

    The epsilon of this noise is at most the target and at most min(0.01, 1 % of the target) below it.

    Args:
      epsilon: target epsilon of the whole job, > 0.
      delta: delta of the guarantee, in (0, 1).
      sample_rate: public probability with which a record joins a step, in (0, 1].
      steps: number of logical steps of the whole job, over all rounds, >= 1.
      accountant: name of the accountant, a key of `ACCOUNTANTS`.

    Raises:
      ConfigError: a number is out of its range.
      UnknownName: there is no such accountant.
      PrivacyRefusal: the target is met by less noise than `NOISE_FLOOR`, or not even by `NOISE_CEILING`.
    """
    return calibrated(epsilon, delta, sample_rate, steps, accountant)[0]


@lru_cache(maxsize=256)  # seconds of work, and its result depends on these five numbers only
def calibrated(epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str) -> Point:
    """Returns the noise multiplier of `noise_multiplier_for` and the epsilon that this noise spends.

    Raises:
      ConfigError: a number is out of its range.
      UnknownName: there is no such accountant.
      PrivacyRefusal: the target is met by less noise than `NOISE_FLOOR`, or not even by `NOISE_CEILING`.
    """
    account = lookup(ACCOUNTANTS, accountant, "accountant")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(
            f"epsilon={epsilon} must be > 0 and finite; 8 is loose and 1 is strict, or switch privacy off"
        )
    check_delta(delta)
    check_sample_rate(sample_rate)
    check_steps(steps)

    def spent(noise: float) -> float:
        return _spent(account, Event(noise, sample_rate, steps), delta)

    low, high = _bracket(epsilon, spent)
    return _narrow(epsilon, spent, low, high)


def check_reachable(epsilon: float, delta: float, sample_rate: float, steps: int) -> None:
    """Refuses a target that noise below `NOISE_FLOOR` meets, as `calibrated` does, but in milliseconds.

    The bound is by RDP alone, so that a target between the bounds by PLD and by RDP passes here, and is refused by
    `calibrated`.

    Args:
      epsilon: target epsilon of the whole job, > 0.
      delta: delta of the guarantee, in (0, 1).
      sample_rate: public probability with which a record joins a step, in (0, 1].
      steps: number of logical steps of the whole job, >= 1.

    Raises:
      PrivacyRefusal: the floor's epsilon is at or below the target.
    """
    if epsilon < _least_at_floor(delta, sample_rate, steps):
        return  # as nearly always, and without the second that the import of an accountant takes
    _refuse_below_floor(epsilon, bound_by_rdp([Event(NOISE_FLOOR, sample_rate, steps)], delta))


def _least_at_floor(delta: float, sample_rate: float, steps: int) -> float:
    """Returns a lower bound on `bound_by_rdp` at `NOISE_FLOOR`, in closed form.

    Of the sum over k that is the divergence of whole order a (Mironov et al. 2019, equation 6), only the term k = a is
    taken: q^a exp(a (a - 1) / (2 sigma^2)).
    """
    least = math.inf
    for order in WHOLE_ORDERS:
        rdp = order / (2 * NOISE_FLOOR**2) + order / (order - 1) * math.log(sample_rate)
        turned = math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        least = min(least, steps * max(rdp, 0.0) + turned)
    return least


def _spent(account: Accountant, event: Event, delta: float) -> float:
    """Returns the epsilon of an event, or infinity where the accountant refuses to compute one that large."""
    try:
        return account([event], delta)
    except PrivacyRefusal:
        return math.inf


def _refuse_below_floor(epsilon: float, at_floor: float) -> None:
    if at_floor <= epsilon:
        raise PrivacyRefusal(
            f"epsilon={epsilon} needs less than noise_multiplier={NOISE_FLOOR}, the floor below which accountants "
            f"exhaust memory; the floor already gives {at_floor:.4g}: set epsilon below that, or take more steps"
        )


def _bracket(epsilon: float, spent: Spent) -> tuple[Point, Point]:
    """Returns two points, the first above the target epsilon and the second at or below it.

    Raises:
      PrivacyRefusal: the floor's epsilon is not above the target, or the ceiling's is.
    """
    high = (1.0, spent(1.0))
    low = high
    while high[1] > epsilon:
        low, noise = high, high[0] * 2
        if noise > NOISE_CEILING:
            raise PrivacyRefusal(
                f"epsilon={epsilon} is not met even by noise_multiplier={NOISE_CEILING:g}; raise epsilon or delta"
            )
        high = (noise, spent(noise))
    while low[1] <= epsilon:
        high, noise = low, max(low[0] / 2, NOISE_FLOOR)
        low = (noise, spent(noise))
        if noise == NOISE_FLOOR:
            _refuse_below_floor(epsilon, low[1])
    return low, high


def _narrow(epsilon: float, spent: Spent, low: Point, high: Point) -> Point:
    """Returns the upper end of the bracket once its epsilon is near enough to the target."""
    slack = min(TOLERANCE, epsilon / 100)
    for turn in range(MAX_EVALUATIONS):
        if epsilon - high[1] <= slack or math.log(high[0] / low[0]) < 1e-6:
            break
        noise = _guess(epsilon - slack / 2, low, high) if turn % 3 < 2 else math.sqrt(low[0] * high[0])
        point = (noise, spent(noise))
        low, high = (point, high) if point[1] > epsilon else (low, point)
    return high


def _guess(target: float, low: Point, high: Point) -> float:
    """Returns the noise where log epsilon, taken as linear in log noise, meets the target; inside the bracket."""
    part = 0.5
    if math.isfinite(low[1]) and high[1] > 0:
        part = math.log(low[1] / target) / math.log(low[1] / high[1])
    return low[0] * (high[0] / low[0]) ** min(max(part, 0.02), 0.98)
