"""The table of privacy accountants: events in, epsilon out.

All accountants work under Poisson sampling at a fixed rate, for two data sets of which one has a record where the other
has an empty record. An empty record adds nothing, so the numbers are those of adding or removing a record. A Gaussian
DP (central limit) accountant is absent on purpose: measured against PLD it under-reports epsilon by up to 56 %.

Each accountant imports its library at its first use: `dp_accounting` takes a second of CPU and Opacus four, and most
commands open a ledger or look up a name and compute nothing.
"""

import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING

from offsite.errors import ConfigError, PrivacyRefusal
from offsite.privacy.events import Event, compose

if TYPE_CHECKING:
    import numpy as np
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
    from numpy.typing import NDArray

    Divergences = NDArray[np.float64]

Accountant = Callable[[Sequence[Event], float], float]

# Measured: one epsilon at 2000 steps of the full batch, the widest privacy loss that is of any use. PLD: 0.4 GB and 2 s
# at 0.2, 0.6 GB and 6 s at 0.1, 1.1 GB at 0.05, 2.8 GB and 24 s at 0.02. PRV: above 9 GB (out of memory) from 0.1 down
# even at sample_rate=0.02. Noise of 0.2 at 20 steps of sample_rate=0.02 is epsilon 46, so nothing private is lost.
NOISE_FLOOR = 0.2
# PRV's mesh grows with the privacy loss itself: 0.4 GB at epsilon 47, 0.8 GB at 169, 3.9 GB at 569, none at 11665.
PRV_EPSILON_LIMIT = 100.0
# PLD's grid; 1e-3 agrees with 1e-4 to 1e-3 in epsilon over some thousand steps, and always errs upwards. Many steps of
# less than that each add up to 7 % of error, and 1e-4 takes ten times as long.
PLD_INTERVAL, PLD_FINE_INTERVAL = 1e-3, 1e-4
FINE_BELOW_RATE, FINE_FROM_STEPS, FINE_FROM_NOISE = 2e-3, 1000, 0.5
# Opacus' own orders, and further orders for very small and very large noise.
RDP_ORDERS = [1 + x / 100 for x in range(1, 10)] + [1 + x / 10 for x in range(1, 100)] + list(range(11, 64))
RDP_ORDERS += [2.0**x for x in range(6, 12)]
# Whole orders have a finite sum, which always converges; smaller orders are best only where PLD is better still.
WHOLE_ORDERS = [*range(2, 64), *range(64, 256, 8), *range(256, 512, 32), *range(512, 2049, 128)]


def check_delta(delta: float) -> None:
    """Checks that a delta lies strictly between 0 and 1.

    Raises:
      ConfigError: the delta lies outside.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta={delta} must be in (0, 1); min(1e-6, 1 / (100 n)) for n records is the default")


def check_noise(noise_multiplier: float) -> None:
    """Checks that accountants can account for a noise multiplier.

    Raises:
      PrivacyRefusal: the noise multiplier is below `NOISE_FLOOR`.
    """
    if noise_multiplier < NOISE_FLOOR:
        raise PrivacyRefusal(
            f"noise_multiplier={noise_multiplier} is below the floor {NOISE_FLOOR}, where accountants exhaust memory "
            "and epsilon protects nobody; raise the noise, or lower the target epsilon that it was calibrated from"
        )


@dataclass(frozen=True)
class Bound:
    """An upper bound on a spent epsilon.

    Attributes:
      epsilon: the bound.
      by: name of the accounting that gave the bound, `pld` or `rdp`.
    """

    epsilon: float
    by: str


def tighter_bound(events: Sequence[Event], delta: float) -> Bound:
    """Returns the smaller of two upper bounds on the spent epsilon: by PLD on a grid, and by RDP.

    Both bounds hold, so the smaller one does. PLD is near the truth, but its grid rounds every step upwards; over very
    many steps of little each, that adds up to more than RDP gives away.

    Args:
      events: events that are spent together; at least one.
      delta: delta of the guarantee, in (0, 1).
    """
    pld, rdp = _composed(tuple(events))
    bounds = [Bound(float(pld.get_epsilon_for_delta(delta)), "pld"), Bound(_epsilon_by_rdp(rdp, delta), "rdp")]
    return min(bounds, key=lambda bound: bound.epsilon)


def bound_by_rdp(events: Sequence[Event], delta: float) -> float:
    """Returns an upper bound on the spent epsilon by RDP alone, in milliseconds; arguments as for `tighter_bound`."""
    return _epsilon_by_rdp(_divergences(events), delta)


@lru_cache(maxsize=4)  # a report asks for the same events at several deltas
def _composed(events: tuple[Event, ...]) -> "tuple[PrivacyLossDistribution, Divergences]":
    """Returns the privacy loss distribution of events on a grid, and their Renyi divergences at `WHOLE_ORDERS`."""
    from dp_accounting.pld.privacy_loss_distribution import identity

    interval = _interval(events)
    pld = identity(interval)
    for event in events:
        pld = pld.compose(_loss_of_step(event.sample_rate, event.noise_multiplier, interval).self_compose(event.steps))
    return pld, _divergences(events)


@lru_cache(maxsize=8)  # a tenth of a second of work; a report asks for the epsilon after each round
def _loss_of_step(sample_rate: float, noise_multiplier: float, interval: float) -> "PrivacyLossDistribution":
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=sample_rate,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


@lru_cache(maxsize=8)  # as for the distribution of a step
def _divergences_of_step(sample_rate: float, noise_multiplier: float) -> "Divergences":
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(WHOLE_ORDERS, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    noise = dp_accounting.GaussianDpEvent(noise_multiplier)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(sample_rate, noise))
    return accountant.rdp


def _divergences(events: Sequence[Event]) -> "Divergences":
    """Returns the Renyi divergences of events at `WHOLE_ORDERS`; those of steps add up."""
    of_each = [event.steps * _divergences_of_step(event.sample_rate, event.noise_multiplier) for event in events]
    return reduce(operator.add, of_each)


def _epsilon_by_rdp(divergences: "Divergences", delta: float) -> float:
    from dp_accounting.rdp import compute_epsilon

    return float(compute_epsilon(WHOLE_ORDERS, divergences, delta)[0])


def _interval(events: Sequence[Event]) -> float:
    fine = all(event.sample_rate < FINE_BELOW_RATE and event.noise_multiplier >= FINE_FROM_NOISE for event in events)
    return PLD_FINE_INTERVAL if fine and sum(event.steps for event in events) >= FINE_FROM_STEPS else PLD_INTERVAL


def _pld(events: list[Event], delta: float) -> float:
    return tighter_bound(events, delta).epsilon


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Hides Opacus' warning about a best Renyi order at an end of the range: the bound is valid, merely looser."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        yield


def _rdp(events: list[Event], delta: float) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(event.noise_multiplier, event.sample_rate, event.steps) for event in events]
    with _expected_warnings():
        return float(accountant.get_epsilon(delta, alphas=RDP_ORDERS))


def _prv(events: list[Event], delta: float) -> float:
    import numpy as np
    from opacus.accountants import PRVAccountant

    bound = _rdp(events, delta)
    if bound > PRV_EPSILON_LIMIT:
        raise PrivacyRefusal(
            f"epsilon={bound:.4g} by rdp is above {PRV_EPSILON_LIMIT:g}, where accountant='prv' exhausts memory; "
            "raise the noise, take fewer steps, or use accountant='pld'"
        )
    accountant = PRVAccountant()
    accountant.history = [(event.noise_multiplier, event.sample_rate, event.steps) for event in events]
    # At sample_rate=1 Opacus takes the logarithm of 1 - 1 in a branch that it then does not use.
    with _expected_warnings(), np.errstate(divide="ignore"):
        return float(accountant.get_epsilon(delta))


def _guarded(epsilon: Callable[[list[Event], float], float]) -> Accountant:
    """Returns an accountant that checks its arguments, coalesces events, and never returns infinity or NaN."""

    def guarded(events: Sequence[Event], delta: float) -> float:
        check_delta(delta)
        coalesced = compose(events)
        for event in coalesced:
            check_noise(event.noise_multiplier)
        spent = epsilon(coalesced, delta) if coalesced else 0.0
        if not math.isfinite(spent):
            raise PrivacyRefusal(f"epsilon={spent} is no guarantee at delta={delta}; raise delta or the noise")
        return max(spent, 0.0)

    return guarded


ACCOUNTANTS: dict[str, Accountant] = {
    # Koskela et al. 2020 (arXiv 1906.03049); Doroshenko et al. 2022 (arXiv 2207.04380); or RDP where that is smaller
    "pld": _guarded(_pld),
    "prv": _guarded(_prv),  # Gopi, Lee, Wutschitz 2021 (arXiv 2106.02848)
    "rdp": _guarded(_rdp),  # Mironov, Talwar, Zhang 2019 (arXiv 1908.10530), converted as in arXiv 1905.09982
}


def taken(accountant: str, events: Sequence[Event], delta: float) -> str:
    """Returns the name of the accounting that gives an accountant's epsilon: for `pld`, that of the smaller bound.

    Args:
      accountant: key of `ACCOUNTANTS`.
      events: events that are spent together; at least one.
      delta: delta of the guarantee, in (0, 1).
    """
    return tighter_bound(compose(events), delta).by if accountant == "pld" else accountant
