"""privacy.sampler: each record joins with its own probability, independently of all others."""

import numpy as np
import pytest
from scipy import stats

from offsite.errors import ConfigError
from offsite.privacy.randomness import Randomness
from offsite.privacy.sampler import poisson


def draws(n, rate, steps, seed=21):
    source = Randomness.for_simulation(seed, "sampler")
    return [poisson(n, rate, source) for _ in range(steps)]


def test_full_rate_takes_everyone_and_no_records_give_an_empty_batch():
    assert draws(5, 1.0, 1)[0].tolist() == [0, 1, 2, 3, 4]
    assert draws(0, 0.5, 1)[0].tolist() == []


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, float("nan")])
def test_refuses_a_rate_that_is_no_probability(rate):
    with pytest.raises(ConfigError, match="sample_rate="):
        draws(5, rate, 1)


def test_a_record_joins_where_its_number_is_below_the_rate_and_not_at_the_rate():
    """A record never joins more often than the accountants take: numbers lie on a grid, and one may be the rate."""

    class Given:
        def uniform(self, n):
            return np.array([0.0, 0.25, np.nextafter(0.25, 0)])[:n]

    assert poisson(3, 0.25, Given()).tolist() == [0, 2]


@pytest.mark.statistical
def test_sizes_are_binomial():
    n, rate, steps = 200, 0.05, 1000
    sizes = np.array([len(drawn) for drawn in draws(n, rate, steps)])
    assert stats.binomtest(int(sizes.sum()), n * steps, rate).pvalue > 1e-3
    for wrong in (0.9 * rate, 1.1 * rate):
        assert stats.binomtest(int(sizes.sum()), n * steps, wrong).pvalue < 1e-3
    # A sampler of fixed size, or one that shuffles, has the right mean and no variance.
    spread = (steps - 1) * sizes.var(ddof=1) / (n * rate * (1 - rate))
    assert 1e-3 < stats.chi2.cdf(spread, steps - 1) < 1 - 1e-3


@pytest.mark.statistical
def test_every_record_joins_as_often_and_pairs_join_independently():
    n, rate, steps = 50, 0.2, 2000
    joined = np.zeros((steps, n))
    for step, drawn in enumerate(draws(n, rate, steps)):
        joined[step, drawn] = 1
    counts = joined.sum(0)
    chi = ((counts - steps * rate) ** 2 / (steps * rate * (1 - rate))).sum()
    assert 1e-3 < stats.chi2.cdf(chi, n) < 1 - 1e-3
    correlation = np.corrcoef(joined.T)[np.triu_indices(n, 1)]
    assert abs(correlation.mean()) < 5 / np.sqrt(steps * len(correlation))
    assert np.abs(correlation).max() < 0.12
