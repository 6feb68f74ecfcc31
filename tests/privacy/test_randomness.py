"""privacy.randomness: the noise is normal, fresh, and repeatable in a simulation only."""

import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from offsite.privacy.randomness import Randomness


def test_uniform_is_the_top_bits_of_the_aes_ctr_keystream_counted_block_by_block():
    key = hashlib.sha256(b"a key").digest()
    block = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    stream = b"".join(block.update(i.to_bytes(16, "big")) for i in range(3))
    words = [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(5)]
    found = Randomness(key, seeded=True).uniform(5)
    assert found.tolist() == [((word >> 12) + 0.5) / 2**52 for word in words]


class Constant:
    """A keystream of one byte again and again."""

    def __init__(self, byte):
        self.byte = byte

    def update(self, data):
        return bytes([self.byte]) * len(data)


@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_extreme_keystreams_stay_inside_the_open_interval(byte):
    source = Randomness(bytes(32), seeded=True)
    source._stream = Constant(byte)
    numbers = source.uniform(3)
    assert ((numbers > 0) & (numbers < 1)).all()
    normal = source.normal(3)
    assert np.isfinite(normal).all()
    assert np.abs(normal).max() < 8.7


def test_simulation_repeats_by_seed_and_labels_and_nothing_else():
    def first(*args):
        return Randomness.for_simulation(*args).uniform(4).tolist()

    assert first(1, "a", "b") == first(1, "a", "b")
    others = [first(2, "a", "b"), first(1, "ab"), first(1, "b", "a"), first(1, "a", "b", ""), first(1)]
    assert len({tuple(other) for other in [*others, first(1, "a", "b")]}) == 6


def test_the_stream_never_repeats_and_does_not_depend_on_the_pieces():
    whole = Randomness.for_simulation(4).uniform(10)
    pieces = Randomness.for_simulation(4)
    assert np.concatenate([pieces.uniform(3), pieces.uniform(0), pieces.uniform(7)]).tolist() == whole.tolist()
    assert len(set(whole)) == 10


def test_the_operating_systems_key_differs_each_time_and_says_so():
    first, second = Randomness.from_os(), Randomness.from_os()
    assert not first.seeded
    assert Randomness.for_simulation(0).seeded
    assert first.uniform(4).tolist() != second.uniform(4).tolist()


@pytest.mark.statistical
def test_uniform_and_normal_have_their_distributions():
    source = Randomness.for_simulation(11)
    assert stats.kstest(source.uniform(200_000), "uniform").pvalue > 1e-3
    normal = source.normal(200_001)
    assert len(normal) == 200_001
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    assert stats.kstest(normal * 1.02, "norm").pvalue < 1e-3
    assert abs(stats.kurtosis(normal)) < 0.05
    halves = normal[:100_000], normal[100_001:]  # the cosines and the sines of the same radii
    assert abs(np.corrcoef(*halves)[0, 1]) < 0.02
    assert abs(np.corrcoef(halves[0] ** 2, halves[1] ** 2)[0, 1]) < 0.02
