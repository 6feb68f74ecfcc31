"""The ring against exact fractions: sums within a step, no wrap at the extremes, no silent repair."""

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from offsite.errors import ConfigError, RangeError
from offsite.secagg import ring

CLIPS = st.floats(2.0**-100, 2.0**100, allow_nan=False)


@st.composite
def cohorts(draw):
    """Draws a clip, n updates of one length within it (often exactly at it), and rounding draws near both ends."""
    clip, n, length = draw(CLIPS), draw(st.integers(1, 64)), draw(st.integers(1, 6))
    edge = ring.bound(clip)
    values = st.one_of(st.sampled_from([-edge, edge, 0.0]), st.floats(-edge, edge, width=32))
    updates = draw(hnp.arrays(np.float32, (n, length), elements=values))
    ends = st.sampled_from([0.0, 1 - 2.0**-53, 1 - 2.0**-32, 0.5, 2.0**-40])
    return clip, updates, draw(hnp.arrays(np.float64, (n, length), elements=ends))


@settings(max_examples=200, deadline=None)
@given(cohorts())
def test_sum_of_all_sites_is_the_plain_sum_within_a_step_each(cohort):
    clip, updates, draws = cohort
    n, step = len(updates), 1 / Fraction(ring.scale(clip, len(updates)))
    parts = [
        ring.encode(update, clip=clip, members=n, randomness=lambda count, row=row: row)
        for update, row in zip(updates, draws, strict=True)
    ]
    integers = [part.view(np.int32).astype(object) for part in parts]
    assert all(abs(int(value)) <= ring.levels(n) for part in integers for value in part)
    total = np.add.reduce(parts, dtype=np.uint32)
    assert total.view(np.int32).tolist() == sum(integers).tolist()
    decoded = ring.decode(total, clip=clip, members=n, summed=n)
    for column, value in zip(updates.T, decoded, strict=True):
        truth = sum(Fraction(float(x)) for x in column)
        assert (
            abs(Fraction(float(value)) - truth) <= n * step + max(abs(truth), abs(Fraction(float(value)))) / 2**50
        )  # the last term covers float64 rounding


@settings(max_examples=100, deadline=None)
@given(CLIPS, st.integers(1, 1 << 12), st.sampled_from([0.0, 1 - 2.0**-53]))
def test_extreme_values_cannot_wrap(clip, n, draw):
    edge = np.float32(ring.bound(clip))
    both = np.array([edge, -edge], dtype=np.float32)
    high, low = ring.encode(both, clip=clip, members=n, randomness=lambda count: np.full(count, draw)).view(np.int32)
    assert n * int(high) < 2**31
    assert n * int(low) >= -(2**31)
    assert ring.levels(n) - 1 <= int(high) <= ring.levels(n)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 16, 17, 64])
def test_levels_leave_room_for_every_site(n):
    assert ring.levels(n) == 2 ** (32 - math.ceil(math.log2(n)) - 1) - 1
    assert n * ring.levels(n) < 2**31


@pytest.mark.statistical
def test_rounding_has_mean_zero():
    """The mean error of 4e5 roundings is within 5 sigma of zero, and plain truncation is far outside."""
    generator = np.random.default_rng(5)
    update = generator.uniform(-1, 1, 400_000).astype(np.float32) * np.float32(2.0**-20)
    exact = update.astype(np.float64) * ring.scale(1.0, 16)
    sigma = 0.5 / math.sqrt(update.size)
    error = ring.encode(update, clip=1.0, members=16).view(np.int32) - exact
    assert abs(error.mean()) < 5 * sigma
    assert np.abs(error).max() < 1
    truncated = ring.encode(update, clip=1.0, members=16, randomness=np.zeros).view(np.int32) - exact
    assert abs(truncated.mean()) > 100 * sigma


def test_an_update_clipped_in_float32_is_accepted():
    for clip in (0.1, 0.3, 1e-3, 1 / 3):
        update = np.array([5, -5, 0], dtype=np.float32).clip(-clip, clip).astype(np.float32)
        ring.encode(update, clip=clip, members=3)


@pytest.mark.parametrize("place", [0, 70_000, 199_999])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.nextafter(np.float32(0.5), np.float32(1))])
def test_one_bad_value_anywhere_is_refused(place, value):
    update = np.zeros(200_000, dtype=np.float32)
    update[place] = value
    with pytest.raises(RangeError, match="outside the clip or not finite"):
        ring.encode(update, clip=0.5, members=3)


@pytest.mark.parametrize("draws", [np.ones, lambda n: -np.ones(n), lambda n: np.zeros(n + 1), lambda n: [np.nan] * n])
def test_bad_randomness_is_refused(draws):
    with pytest.raises(RangeError, match=r"\[0, 1\)"):
        ring.encode(np.zeros(3, np.float32), clip=1.0, members=3, randomness=draws)


@pytest.mark.parametrize("clip", [0.0, -1.0, np.nan, np.inf, 1e39, 1e-46])
def test_bad_clip_is_refused(clip):
    with pytest.raises(ConfigError, match="clip="):
        ring.encode(np.zeros(3, np.float32), clip=clip, members=3)


@pytest.mark.parametrize("members", [0, -1, (1 << 30) + 1])
def test_bad_member_count_is_refused(members):
    with pytest.raises(ConfigError, match="members="):
        ring.levels(members)


def test_a_sum_with_a_mask_left_is_refused():
    total = np.array([3 * ring.levels(5)], dtype=np.uint32)
    ring.decode(total, clip=1.0, members=5, summed=3)
    for wrong, summed in (
        (total + np.uint32(1), 3),
        (np.uint32(0) - total - np.uint32(1), 3),
        (total, 2),
        (total, 0),
        (total, 6),
    ):
        with pytest.raises(RangeError):
            ring.decode(wrong, clip=1.0, members=5, summed=summed)


def test_digest_is_over_little_endian_bytes():
    assert ring.digest(np.array([1, 2**31], np.uint32)) == hashlib.sha256(b"\x01\0\0\0\0\0\0\x80").digest()
