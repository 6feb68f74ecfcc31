"""The promises of every entry of privacy.accountants.ACCOUNTANTS; a new entry inherits all tests."""

import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from offsite.errors import ConfigError, PrivacyRefusal
from offsite.privacy.accountants import ACCOUNTANTS, NOISE_FLOOR
from offsite.privacy.events import Event

each = pytest.mark.parametrize("name", sorted(ACCOUNTANTS))
DELTA = 1e-5


@each
def test_no_events_spend_nothing(name):
    assert ACCOUNTANTS[name]([], DELTA) == 0.0


@each
def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise_and_delta(name):
    epsilon = ACCOUNTANTS[name]
    base = epsilon([Event(1.0, 0.05, 100)], DELTA)
    assert 0 < base < epsilon([Event(1.0, 0.05, 200)], DELTA)
    assert base < epsilon([Event(1.0, 0.06, 100)], DELTA)
    assert base < epsilon([Event(0.9, 0.05, 100)], DELTA)
    assert base < epsilon([Event(1.0, 0.05, 100)], DELTA / 10)
    assert base < epsilon([Event(1.0, 0.05, 100), Event(5.0, 0.05, 10)], DELTA)


@each
def test_rounds_apart_spend_what_one_job_spends(name):
    epsilon = ACCOUNTANTS[name]
    assert epsilon([Event(1.1, 0.04, 10)] * 6, DELTA) == epsilon([Event(1.1, 0.04, 60)], DELTA)


@each
def test_order_does_not_matter(name):
    epsilon = ACCOUNTANTS[name]
    events = [Event(1.1, 0.04, 20), Event(2.0, 0.1, 5), Event(0.9, 0.01, 30)]
    assert epsilon(events, DELTA) == pytest.approx(epsilon(events[::-1], DELTA), abs=1e-6)


@each
@pytest.mark.parametrize(("noise", "steps"), [(3.0, 1), (5.0, 30), (20.0, 200)])
def test_never_below_the_closed_form_without_sampling(name, noise, steps):
    """k Gaussian steps of the full batch are a step of noise/sqrt(k) (Balle and Wang 2018, arXiv 1805.06530, thm 8)."""
    spread = noise / math.sqrt(steps)

    def excess(epsilon):
        a, b = 0.5 / spread - epsilon * spread, -0.5 / spread - epsilon * spread
        return norm.cdf(a) - math.exp(epsilon) * norm.cdf(b) - DELTA

    right = brentq(excess, 0, 200)
    found = ACCOUNTANTS[name]([Event(noise, 1.0, steps)], DELTA)
    assert right - 1e-6 <= found <= right * 1.2 + 0.02


@each
@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, 2.0])
def test_refuses_a_delta_out_of_range(name, delta):
    for events in ([], [Event(1.0, 0.1, 1)]):
        with pytest.raises(ConfigError, match=r"delta=.* must be in \(0, 1\)"):
            ACCOUNTANTS[name](events, delta)


@each
def test_refuses_noise_below_the_floor_with_the_reason(name):
    with pytest.raises(PrivacyRefusal, match=r"noise_multiplier=0\.19 is below the floor .* exhaust memory"):
        ACCOUNTANTS[name]([Event(1.0, 0.1, 1), Event(0.19, 0.02, 1)], DELTA)
    assert math.isfinite(ACCOUNTANTS[name]([Event(NOISE_FLOOR, 0.02, 20)], DELTA))
