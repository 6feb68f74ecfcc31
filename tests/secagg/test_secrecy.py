"""What the coordinator sees: a single upload is uniform, and colluders below the threshold reconstruct nothing."""

import numpy as np
import pytest
from scipy import stats

from offsite.errors import TooFewSurvivors
from offsite.secagg import agreement, mask, ring, shamir
from offsite.secagg.signed_bodies import MASK_KEY, SELF_MASK, read_released

LENGTH = 120_000


def p_values(vector):
    """Two-sided p-values of four tests that the words are independent and uniform."""
    raw = vector.view(np.uint8)
    tails = []
    for counts in (np.bincount(raw, minlength=256), np.bincount(vector >> np.uint32(22), minlength=1024)):
        statistic = stats.chisquare(counts).statistic
        tails.append(2 * min(stats.chi2.cdf(statistic, counts.size - 1), stats.chi2.sf(statistic, counts.size - 1)))
    ones = int(np.unpackbits(raw).sum())
    tails.append(2 * stats.norm.sf(abs(ones - 4 * raw.size) / np.sqrt(2 * raw.size)))
    centred = vector.astype(np.float64) / 2**32 - 0.5
    serial = (centred[:-1] * centred[1:]).sum() * 12 / np.sqrt(vector.size - 1)
    tails.append(2 * stats.norm.sf(abs(serial)))
    return tails


def uniform(vector):
    return min(p_values(vector)) > 1e-6


@pytest.mark.statistical
def test_one_upload_is_uniform_and_says_nothing_about_the_update(federation):
    round_ = federation(4, length=LENGTH)
    round_.updates["a0"] = np.linspace(-1, 1, LENGTH, dtype=np.float32)
    round_.updates["b0"] = np.zeros(LENGTH, dtype=np.float32)
    round_.until("survivors")
    for site in ("a0", "b0", "c0"):
        assert uniform(round_.uploads[site])
    correlation = np.corrcoef(round_.uploads["a0"].astype(np.float64), round_.updates["a0"])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(LENGTH)
    difference = round_.uploads["a0"] - round_.uploads["b0"]
    assert uniform(difference)


@pytest.mark.statistical
def test_uniform_rejects_unmasked_and_badly_masked_vectors():
    generator = np.random.default_rng(3)
    update = generator.uniform(-1, 1, LENGTH).astype(np.float32)
    plain = ring.encode(update, clip=1.0, members=4)
    words = np.zeros(LENGTH, dtype=np.uint32)
    mask.add(words, bytes(range(32)))
    assert uniform(words)
    assert uniform(words + plain)
    assert not uniform(plain)
    assert not uniform(words & np.uint32(0xFFFFFFF))  # 28-bit masks
    assert not uniform((words.astype(np.uint64) * 255 // 256).astype(np.uint32))  # the last values never drawn
    assert not uniform(np.repeat(words[: LENGTH // 2], 2))  # words used twice
    assert not uniform(
        np.arange(LENGTH, dtype=np.uint32) * np.uint32(2**32 // LENGTH)
    )  # too even, which the second side of the tests sees


def test_colluders_below_the_threshold_reconstruct_nothing(federation):
    """t-1 sites and the coordinator pool everything; every value of the victim's secrets remains possible."""
    round_ = federation(7).until("survivors")
    threshold, victim = round_.terms.threshold, "a0"
    colluders = round_.sites[1:threshold]
    places = {site: round_.sites.index(site) + 1 for site in colluders}
    for kind in (0, 1):
        held = {places[site]: round_.members[site]._secrets.held[victim][kind] for site in colluders}
        assert len(held) == threshold - 1
        with pytest.raises(TooFewSurvivors):
            shamir.combine(held, threshold=threshold)
        wrong = shamir.combine(held, threshold=threshold - 1)
        keys = round_.collector._agreed.keys[victim]
        assert agreement.commit(round_.terms, victim, wrong) != keys.commitment
        assert agreement.public_of(wrong) != keys.mask
        for guess in (0, 1, agreement.new_scalar()):
            weights = shamir.combine({**held, 7: 0}, threshold=threshold)
            slope = (shamir.combine({**held, 7: 1}, threshold=threshold) - weights) % shamir.ORDER
            missing = (guess - weights) * pow(slope, -1, shamir.ORDER) % shamir.ORDER
            assert shamir.combine({**held, 7: missing}, threshold=threshold) == guess


def test_every_site_but_one_learns_only_the_difference_of_the_sum(federation):
    """n-1 colluders who know all their own pair masks still face the victim's self-mask until its release."""
    round_ = federation(4, length=LENGTH)
    round_.updates["a0"] = np.zeros(LENGTH, dtype=np.float32)
    round_.keys()
    scalars = {site: round_.members[site]._secrets.mask for site in ("b0", "c0", "d0")}
    round_.shares()
    round_.masked()
    transcript, keys = round_.collector._agreed.transcript, round_.collector._agreed.keys
    left = round_.uploads["a0"].copy()
    for site, scalar in scalars.items():
        secret = agreement.exchange(agreement.private_of(scalar), keys["a0"].mask, peer="a0")
        mask.subtract(left, agreement.pair_key(secret, transcript, "a0", site))
    assert uniform(left)


def test_fewer_answers_than_the_threshold_leave_the_sum_masked(federation):
    round_ = federation(6, length=LENGTH).until("unmask")
    with pytest.raises(TooFewSurvivors):
        round_.unmask(round_.sites[: round_.terms.threshold - 1])
    assert uniform(round_.collector._total)


def test_a_released_answer_has_one_kind_of_share_per_site(federation):
    """From all answers of a round together, nobody learns both secrets of a site."""
    round_ = federation(7)
    round_.run({"c0": "masked", "f0": "masked"})
    kinds = {site: set() for site in round_.sites}
    for answer in round_.sent["unmask"].values():
        for site, (kind, _) in read_released(answer.body).items():
            kinds[site].add(kind)
    assert kinds == {site: {MASK_KEY if site in ("c0", "f0") else SELF_MASK} for site in round_.sites}
