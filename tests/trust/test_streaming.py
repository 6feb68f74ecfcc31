"""Encrypted files in chunks: a second decryption from the definition, every alteration refused, and constant memory."""

import io
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from offsite.errors import ConfigError, Untrusted
from offsite.trust.streaming import CHUNK_BYTES, PREFIX_BYTES, TAG_BYTES, decrypt, encrypt

KEY = bytes(range(32))
SEALED = CHUNK_BYTES + TAG_BYTES
SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES + 5]


def content(size):
    return np.random.default_rng(size).bytes(size)


def encrypted(plain):
    target = io.BytesIO()
    encrypt(io.BytesIO(plain), target, KEY)
    return target.getvalue()


def opened(data, key=KEY):
    target = io.BytesIO()
    decrypt(io.BytesIO(data), target, key)
    return target.getvalue()


def by_definition(data):
    """Decrypts each chunk under prefix || number || last, written out from the paper."""
    prefix, body = data[:PREFIX_BYTES], data[PREFIX_BYTES:]
    chunks = [body[i : i + SEALED] for i in range(0, len(body), SEALED)]
    nonces = [
        prefix + i.to_bytes(4, "big") + (b"\x01" if i == len(chunks) - 1 else b"\x00") for i in range(len(chunks))
    ]
    return b"".join(AESGCM(KEY).decrypt(n, c, None) for n, c in zip(nonces, chunks, strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_round_trip_by_two_routes(size):
    plain = content(size)
    data = encrypted(plain)
    assert opened(data) == by_definition(data) == plain
    assert len(data) == PREFIX_BYTES + size + TAG_BYTES * max(1, -(-size // CHUNK_BYTES))


def test_two_encryptions_share_no_nonce():
    assert encrypted(b"x" * 50)[:PREFIX_BYTES] != encrypted(b"x" * 50)[:PREFIX_BYTES]


@pytest.mark.parametrize("size", [0, 1, 40])
def test_every_flip_and_every_cut_of_a_small_file_is_refused(size):
    data = encrypted(content(size))
    for place in range(len(data)):
        for bit in range(8):
            altered = bytearray(data)
            altered[place] ^= 1 << bit
            with pytest.raises(Untrusted):
                opened(bytes(altered))
        with pytest.raises(Untrusted):
            opened(data[:place])
    for extra in (b"\x00", bytes(TAG_BYTES), data):
        with pytest.raises(Untrusted):
            opened(data + extra)


def test_chunks_cannot_be_moved_left_out_or_doubled():
    data = encrypted(content(3 * CHUNK_BYTES + 5))
    prefix, body = data[:PREFIX_BYTES], data[PREFIX_BYTES:]
    a, b, c, end = (body[i : i + SEALED] for i in range(0, len(body), SEALED))
    for parts in (
        [b, a, c, end],
        [a, b, end],
        [a, b, c],
        [a, b],
        [a],
        [end],
        [a, a, b, c, end],
        [a, b, c, end, end],
        [],
    ):
        with pytest.raises(Untrusted):
            opened(prefix + b"".join(parts))
    for place in np.linspace(0, len(data) - 1, 25).astype(int):
        altered = bytearray(data)
        altered[place] ^= 0x10
        with pytest.raises(Untrusted):
            opened(bytes(altered))
    for size in (PREFIX_BYTES + SEALED - 1, PREFIX_BYTES + SEALED + 1, PREFIX_BYTES + 2 * SEALED + 15, len(data) - 1):
        with pytest.raises(Untrusted):
            opened(data[:size])


def test_an_end_without_bytes_after_full_chunks_is_not_what_encrypt_writes():
    """Two encodings of one file would have two hashes."""
    prefix = bytes(PREFIX_BYTES)
    aead = AESGCM(KEY)
    full = aead.encrypt(prefix + bytes(5), bytes(CHUNK_BYTES), None)
    end = aead.encrypt(prefix + (1).to_bytes(4, "big") + b"\x01", b"", None)
    with pytest.raises(Untrusted):
        opened(prefix + full + end)


def test_chunks_of_two_files_do_not_mix():
    first, second = encrypted(content(CHUNK_BYTES + 1)), encrypted(content(CHUNK_BYTES + 1))
    with pytest.raises(Untrusted):
        opened(first[: PREFIX_BYTES + SEALED] + second[PREFIX_BYTES + SEALED :])


def test_other_keys():
    data = encrypted(b"secret")
    with pytest.raises(Untrusted):
        opened(data, bytes(32))
    for key in (b"", bytes(16), bytes(33)):
        with pytest.raises(ConfigError, match="32"):
            opened(data, key)
        with pytest.raises(ConfigError):
            encrypt(io.BytesIO(b""), io.BytesIO(), key)


class Slow(io.RawIOBase):
    """A source that hands out a few bytes at a time, and counts them."""

    def __init__(self, size, most):
        self.left, self.most = size, most

    def readable(self):
        return True

    def read(self, size=-1):
        size = min(size, self.left, self.most)
        self.left -= size
        return bytes(size)


def test_a_source_that_hands_out_little_at_a_time():
    target = io.BytesIO()
    encrypt(Slow(2 * CHUNK_BYTES + 3, 70_001), target, KEY)
    assert by_definition(target.getvalue()) == bytes(2 * CHUNK_BYTES + 3)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """96 MiB are encrypted and decrypted in less than 8 MiB."""
    size = 96 * CHUNK_BYTES
    tracemalloc.start()
    with (tmp_path / "sealed").open("wb") as target:
        encrypt(Slow(size, 1 << 30), target, KEY)
    with (tmp_path / "sealed").open("rb") as source, Path(os.devnull).open("wb") as sink:
        decrypt(source, sink, KEY)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * CHUNK_BYTES
