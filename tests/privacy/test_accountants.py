"""Epsilon against other implementations and against the definition of differential privacy itself."""

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from offsite.errors import PrivacyRefusal
from offsite.privacy.accountants import ACCOUNTANTS, WHOLE_ORDERS, bound_by_rdp, taken, tighter_bound
from offsite.privacy.events import Event

# sample_rate, noise_multiplier, steps, delta
SETTINGS = [
    (0.01, 1.0, 1000, 1e-5),
    (0.01, 0.6, 1000, 1e-5),
    (0.05, 1.0, 200, 1e-5),
    (0.1, 1.0, 100, 1e-5),
    (0.1, 2.0, 1000, 1e-5),
    (0.2, 1.5, 50, 1e-4),
    (0.5, 3.0, 60, 1e-4),
    (1.0, 5.0, 30, 1e-4),
    (0.004, 0.6, 750, 1e-6),
    (0.0256, 0.7, 3000, 1e-5),
]


def reference(rate, noise, steps, delta):
    """Returns epsilon by dp-accounting at a ten times finer grid, without our events."""
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), steps)
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize(("rate", "noise", "steps", "delta"), SETTINGS)
def test_three_accountants_agree_at_ten_settings(rate, noise, steps, delta):
    right = reference(rate, noise, steps, delta)
    pld, prv, rdp = (ACCOUNTANTS[name]([Event(noise, rate, steps)], delta) for name in ("pld", "prv", "rdp"))
    assert right - 1e-3 <= pld <= right + 1e-3 * max(1, right)
    assert abs(prv - right) <= 0.02
    assert right - 1e-3 <= rdp <= 1.3 * right


def hockey_stick(epsilon, rate, noise):
    """Returns the delta of one step at an epsilon, by integration over the output; the worse of adding and removing."""

    def alike(x):
        return norm.pdf(x, 0, noise)

    def other(x):
        return (1 - rate) * norm.pdf(x, 0, noise) + rate * norm.pdf(x, 1, noise)

    def divergence(p, q):
        edge = crossing(epsilon, rate, noise, p is other)
        low, high = (edge, 1 + 40 * noise) if p is other else (-40 * noise, edge)
        if not math.isfinite(edge):
            return 0.0
        return quad(lambda x: p(x) - math.exp(epsilon) * q(x), low, high, limit=500, epsabs=1e-14)[0]

    return max(divergence(other, alike), divergence(alike, other))


def crossing(epsilon, rate, noise, removing):
    """Returns the point at which the likelihood ratio 1 - rate + rate * exp((2x - 1) / 2 noise^2) is exp(+-epsilon)."""
    wanted = (math.exp(epsilon if removing else -epsilon) - 1 + rate) / rate
    return noise**2 * math.log(wanted) + 0.5 if wanted > 0 else -math.inf


@pytest.mark.parametrize(
    ("rate", "noise", "delta"),
    [(1.0, 3.0, 1e-5), (1.0, 0.8, 1e-4), (0.5, 1.0, 1e-5), (0.1, 0.5, 1e-5), (0.02, 0.4, 1e-4), (0.02, 0.25, 1e-4)],
)
def test_one_step_meets_the_definition(rate, noise, delta):
    right = brentq(lambda epsilon: hockey_stick(epsilon, rate, noise) - delta, 1e-3, 60)
    for name, above in (("pld", 2e-3), ("prv", 0.02), ("rdp", math.inf)):
        found = ACCOUNTANTS[name]([Event(noise, rate, 1)], delta)
        assert right - 1e-4 <= found <= right + above


def test_hockey_stick_of_a_plain_gaussian_is_the_closed_form():
    for epsilon in np.linspace(0.1, 3, 5):
        closed = norm.cdf(0.5 / 2 - epsilon * 2) - math.exp(epsilon) * norm.cdf(-0.5 / 2 - epsilon * 2)
        assert hockey_stick(epsilon, 1.0, 2.0) == pytest.approx(closed, rel=1e-6, abs=1e-13)


def test_the_gdp_accountant_is_absent():
    assert "gdp" not in ACCOUNTANTS


def test_prv_refuses_what_would_exhaust_memory_and_names_pld():
    with pytest.raises(PrivacyRefusal, match="accountant='pld'"):
        ACCOUNTANTS["prv"]([Event(0.3, 1.0, 2000)], 1e-4)


def test_mixed_mechanisms_compose_as_in_dp_accounting():
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    for noise, rate, steps in ((1.0, 0.05, 50), (0.7, 0.02, 20)):
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), steps)
    found = ACCOUNTANTS["prv"]([Event(1.0, 0.05, 50), Event(0.7, 0.02, 20)], 1e-5)
    assert found == pytest.approx(accountant.get_epsilon(1e-5), abs=0.02)


@pytest.mark.parametrize("library", [PLDAccountant, RdpAccountant], ids=["pld", "rdp"])
def test_a_step_that_is_kept_composes_to_what_the_library_gives(library):
    """A step's distribution is computed once for all numbers of steps; equal to the last bit, in any order."""
    for steps, more in ((36, 0), (6, 0), (12, 5), (6, 0)):
        settings = {"value_discretization_interval": 1e-3} if library is PLDAccountant else {"orders": WHOLE_ORDERS}
        accountant, events = library(**settings), [Event(1.0, 0.16, steps), *([Event(2.0, 0.1, more)] if more else [])]
        for event in events:
            noise = dp_accounting.GaussianDpEvent(event.noise_multiplier)
            accountant.compose(dp_accounting.PoissonSampledDpEvent(event.sample_rate, noise), event.steps)
        found = tighter_bound(events, 1e-6).epsilon if library is PLDAccountant else bound_by_rdp(events, 1e-6)
        assert found == accountant.get_epsilon(1e-6)


# Rate, noise, steps; epsilon at 1e-6 by PLD on the grid of 1e-3, and the epsilon and the accounting that are now taken.
MANY_STEPS = [(0.0005, 0.8, 20_000, 0.6634, 0.6179, "pld"), (0.002, 8.0, 10**6, 1.9915, 1.1484, "rdp")]


@pytest.mark.parametrize(("rate", "noise", "steps", "coarse", "epsilon", "by"), MANY_STEPS)
def test_over_many_steps_the_smaller_of_two_bounds_is_taken(rate, noise, steps, coarse, epsilon, by):
    """The other implementations: PLD on one grid for all, and Opacus' Renyi accountant with its own conversion."""
    events = [Event(noise, rate, steps)]
    bound = tighter_bound(events, 1e-6)
    assert bound.epsilon == pytest.approx(epsilon, abs=1e-3)
    assert (bound.by, taken("pld", events, 1e-6), taken("rdp", events, 1e-6)) == (by, by, "rdp")
    assert ACCOUNTANTS["pld"](events, 1e-6) == bound.epsilon < 0.95 * coarse
    if by == "rdp":
        assert bound.epsilon == pytest.approx(ACCOUNTANTS["rdp"](events, 1e-6), rel=1e-3)


def test_a_bound_over_many_steps_holds_against_the_limit():
    """So many steps of so little each are a Gaussian mechanism (Dong et al. 2019, arXiv 1905.02383, theorem 11)."""
    for rate, noise, steps, *_ in MANY_STEPS:
        spread = rate * math.sqrt(steps * math.expm1(1 / noise**2))

        def excess(epsilon, spread=spread):
            a, b = spread / 2 - epsilon / spread, -spread / 2 - epsilon / spread
            return norm.cdf(a) - math.exp(epsilon) * norm.cdf(b) - 1e-6

        limit = brentq(excess, 1e-6, 50)
        assert 0.98 * limit <= tighter_bound([Event(noise, rate, steps)], 1e-6).epsilon


def test_with_few_steps_pld_is_taken():
    assert taken("pld", [Event(1.0, 0.05, 200)], 1e-5) == "pld"
