"""Whole rounds against the plain integer sum, with every loss of sites that the threshold allows."""

import itertools
from fractions import Fraction
from math import floor

import numpy as np
import pytest

from offsite.errors import ConfigError, ProtocolViolation, TooFewSurvivors
from offsite.secagg import ring

STEPS = ("keys", "shares", "masked", "survivors", "unmask")


def slow_encode(update, draws, clip, members):
    """The ring by definition, in exact fractions and Python integers."""
    bits = 32 - (members - 1).bit_length()
    factor = Fraction((2 ** (bits - 1) - 1) / float(np.float32(clip)))
    return [floor(Fraction(float(x)) * factor + Fraction(float(u))) % 2**32 for x, u in zip(update, draws, strict=True)]


def plain_sum(round_, members):
    total = [0] * round_.terms.length
    for site in members:
        draws = round_.rounding(site)(round_.terms.length)
        values = slow_encode(round_.updates[site], draws, round_.terms.clip, len(round_.sites))
        total = [(a + b) % 2**32 for a, b in zip(total, values, strict=True)]
    return np.array(total, dtype=np.uint32)


def patterns(n, steps):
    """Every assignment of up to n - t sites to the step at which they vanish."""
    spare = n - (2 * n // 3 + 1)
    sites = [f"{chr(97 + place)}0" for place in range(n)]
    for count in range(spare + 1):
        for gone in itertools.combinations(sites, count):
            for when in itertools.product(steps, repeat=count):
                yield dict(zip(gone, when, strict=True))


def check(round_, vanish):
    result = round_.run(vanish)
    expected = tuple(site for site in round_.sites if vanish.get(site) not in ("keys", "shares", "masked"))
    assert result.members == expected == round_.collector.members
    assert round_.collector.dropped == tuple(sorted(set(round_.sites) - set(expected)))
    np.testing.assert_array_equal(result.ring, plain_sum(round_, expected))
    truth = sum(round_.updates[site].astype(np.float64) for site in expected)
    assert np.abs(result.decoded - truth).max() <= len(expected) / ring.scale(round_.terms.clip, len(round_.sites))
    assert np.linalg.norm(result.decoded - truth) <= 1e-6 * np.linalg.norm(truth)
    assert round_.collector.faulty == ()


@pytest.mark.parametrize("n", [3, 4, 5, 6, 7])
def test_sum_is_the_plain_sum_for_every_way_of_losing_sites(federation, n):
    for vanish in patterns(n, STEPS if n < 7 else ("masked", "unmask")):
        check(federation(n), vanish)


@pytest.mark.parametrize("n", [8, 9])
def test_sum_is_the_plain_sum_for_every_set_lost_before_the_upload(federation, n):
    for vanish in patterns(n, ("masked",)):
        check(federation(n), vanish)


def test_ten_sites_lose_three_in_different_steps(federation):
    for gone in itertools.islice(itertools.combinations([f"{c}0" for c in "abcdefghij"], 3), 0, None, 11):
        check(federation(10), dict(zip(gone, ("shares", "masked", "unmask"), strict=True)))


@pytest.mark.parametrize("step", STEPS)
def test_one_site_too_few_stops_the_round_in_every_step(federation, step):
    with pytest.raises(TooFewSurvivors, match="needed"):
        federation(5).run({"a0": step, "d0": step})


def test_vectors_over_several_chunks_add_up(federation):
    round_ = federation(4, length=300_001)
    result = round_.run({"b0": "masked"})
    expected = np.zeros(300_001, dtype=np.uint32)
    for site in ("a0", "c0", "d0"):
        expected += ring.encode(round_.updates[site], clip=1.0, members=4, randomness=round_.rounding(site))
    np.testing.assert_array_equal(result.ring, expected)


def test_default_rounding_is_random_and_within_one_step(federation):
    round_ = federation(3, length=2000)
    for site, member in round_.members.items():
        round_.collector.add_keys(member.keys(round_.updates[site]))
        round_.sent["keys"][site] = round_.collector._keys[site]
    round_.shares()
    round_.masked()
    round_.survivors()
    result = round_.unmask()
    truth = sum(update.astype(np.float64) for update in round_.updates.values())
    assert np.abs(result.decoded - truth).max() <= 3 / ring.scale(1.0, 3)
    assert not np.array_equal(result.ring, plain_sum(round_, round_.sites))


def test_extreme_updates_of_all_sites_do_not_wrap(federation):
    for sign in (1.0, -1.0):
        round_ = federation(9, clip=0.3)
        for site in round_.sites:
            round_.updates[site] = np.full(5, sign * np.float32(0.3), dtype=np.float32)
        np.testing.assert_allclose(round_.run().decoded, 9 * sign * np.float32(0.3), rtol=1e-7)


def test_strictest_floor_wins(federation):
    round_ = federation(7)
    round_.members["a0"] = round_.member("a0", minimum=7)
    with pytest.raises(TooFewSurvivors, match="this site needs 7"):
        round_.run({"g0": "shares"})
    round_ = federation(7, n_min=6)
    with pytest.raises(TooFewSurvivors, match="6 are needed"):
        round_.run({"f0": "masked", "g0": "masked"})
    with pytest.raises(ConfigError, match="minimum=2"):
        round_.member("a0", minimum=2)
    with pytest.raises(ConfigError, match="minimum=8"):
        round_.member("a0", minimum=8)


def test_one_wrong_message_leaves_the_collector_usable(federation):
    round_ = federation(5)
    stranger = federation(5)
    stranger.until("survivors")
    for site in round_.sites:
        if site == "c0":
            with pytest.raises(ProtocolViolation):
                round_.collector.add_keys(stranger.sent["keys"][site])
    round_.keys()
    round_.shares(["a0", "b0", "d0", "e0"])
    with pytest.raises(ProtocolViolation):
        round_.collector.add_shares(stranger.sent["shares"]["c0"])
    round_.masked()
    with pytest.raises(ProtocolViolation):
        round_.collector.add_masked(stranger.sent["masked"]["c0"], stranger.uploads["c0"])
    round_.survivors()
    assert round_.unmask().members == ("a0", "b0", "d0", "e0")


def test_steps_of_the_collector_come_in_order(federation):
    round_ = federation(4)
    for call in (
        lambda: round_.collector.inbox("a0"),
        round_.collector.announcement,
        round_.collector.signatures,
        round_.collector.sum,
    ):
        with pytest.raises(ProtocolViolation, match="while the round is at step=keys"):
            call()
    assert round_.collector.members == round_.sites
    first = round_.run()
    assert round_.collector.sum() is first
    assert round_.collector.roster() == list(round_.sent["keys"].values())
    for add, step in (("add_keys", "keys"), ("add_shares", "shares"), ("add_unmask", "unmask")):
        with pytest.raises(ProtocolViolation):
            getattr(round_.collector, add)(round_.sent[step]["a0"])
