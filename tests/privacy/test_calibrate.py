"""privacy.calibrate: the noise meets the target closely, and impossible targets are refused."""

import math

import pytest

from offsite.errors import ConfigError, PrivacyRefusal, UnknownName
from offsite.privacy.accountants import ACCOUNTANTS, NOISE_FLOOR, bound_by_rdp
from offsite.privacy.calibrate import check_reachable, noise_multiplier_for, public_delta
from offsite.privacy.events import Event

PLANS = [
    (8.0, 1e-4, 0.02, 8),
    (8.0, 1e-4, 0.02, 20),
    (1.0, 1e-5, 0.05, 400),
    (3.0, 1e-5, 0.2, 100),
    (0.1, 1e-5, 0.01, 1000),
    (1.0, 1e-5, 1.0, 100),
]


@pytest.mark.parametrize("plan", PLANS)
def test_noise_meets_the_target_closely(plan):
    epsilon, delta, rate, steps = plan
    noise = noise_multiplier_for(*plan)
    spent = ACCOUNTANTS["pld"]([Event(noise, rate, steps)], delta)
    assert epsilon - 0.01 <= spent <= epsilon
    assert ACCOUNTANTS["pld"]([Event(noise * 0.98, rate, steps)], delta) > epsilon
    # Another accountant agrees that the target is met.
    assert ACCOUNTANTS["prv"]([Event(noise, rate, steps)], delta) <= epsilon + 0.02


def test_the_table_of_measured_noise():
    """Noise computed beforehand by dp-accounting's own calibration, to four figures."""
    assert noise_multiplier_for(8, 1e-5, 0.01, 1000) == pytest.approx(0.587, abs=0.001)
    assert noise_multiplier_for(3, 1e-5, 0.2, 100) == pytest.approx(2.982, abs=0.01)


@pytest.mark.parametrize("accountant", sorted(ACCOUNTANTS))
def test_every_accountant_calibrates(accountant):
    noise = noise_multiplier_for(3.0, 1e-5, 0.1, 50, accountant=accountant)
    assert 2.99 <= ACCOUNTANTS[accountant]([Event(noise, 0.1, 50)], 1e-5) <= 3.0


def test_more_budget_needs_less_noise():
    noises = [noise_multiplier_for(epsilon, 1e-5, 0.05, 100) for epsilon in (0.5, 1, 2, 4)]
    assert noises == sorted(noises, reverse=True)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_refuses_an_epsilon_that_is_no_target(epsilon):
    with pytest.raises(ConfigError, match=rf"epsilon={epsilon} must be > 0 .*; 8 is loose"):
        noise_multiplier_for(epsilon, 1e-5, 0.1, 10)


def test_refuses_a_target_below_the_floor_with_the_way_out():
    with pytest.raises(PrivacyRefusal, match=r"epsilon=40.0 needs less .* exhaust memory.*take more steps") as refusal:
        noise_multiplier_for(40.0, 1e-4, 0.02, 8)
    limit = float(str(refusal.value).split("already gives ")[1].split(":")[0])
    assert noise_multiplier_for(limit - 0.1, 1e-4, 0.02, 8) >= NOISE_FLOOR


def test_refuses_the_rest():
    with pytest.raises(ConfigError, match="delta=0 must"):
        noise_multiplier_for(1.0, 0, 0.1, 10)
    with pytest.raises(ConfigError, match="sample_rate=0 must"):
        noise_multiplier_for(1.0, 1e-5, 0, 10)
    with pytest.raises(ConfigError, match="steps=0 must"):
        noise_multiplier_for(1.0, 1e-5, 0.1, 0)
    with pytest.raises(UnknownName, match="did you mean pld"):
        noise_multiplier_for(1.0, 1e-5, 0.1, 10, accountant="plb")
    with pytest.raises(PrivacyRefusal, match="not met even by"):
        noise_multiplier_for(0.0005, 1e-9, 1.0, 10**4)


def test_public_delta():
    """At most 1e-6, and over all n records never more than 1/100 in sum."""
    assert [public_delta(n) for n in (1, 100, 10_000)] == [1e-6] * 3
    assert public_delta(1_000_000) == pytest.approx(1e-8)
    assert all(n * public_delta(n) <= 0.01 + 1e-12 for n in (1, 99, 10_001, 10**7))
    with pytest.raises(ConfigError, match="n=0 must be"):
        public_delta(0)


@pytest.mark.parametrize("steps", [1, 6, 1000])
@pytest.mark.parametrize(("records", "batch"), [(20, 1), (20, 10), (1000, 8), (100_000, 8), (100_000, 50_000)])
def test_the_quick_check_refuses_where_the_floor_is_enough(records: int, batch: int, steps: int) -> None:
    """Just below and just above the bound by RDP, and never for a target that the closed form lets pass."""
    rate, delta = batch / records, public_delta(records)
    at_floor = bound_by_rdp([Event(NOISE_FLOOR, rate, steps)], delta)
    check_reachable(at_floor * 0.999, delta, rate, steps)
    with pytest.raises(PrivacyRefusal, match="the floor below which"):
        check_reachable(at_floor * 1.001, delta, rate, steps)
