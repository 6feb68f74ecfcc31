"""Masks: AES-256-CTR keystreams, added to ring elements in place.

The IV is zero, and a key masks one vector and is never used again; the words are little-endian on every machine. A
chunk of 1 MiB stays in the cache, and all keys of a vector go over one chunk before the next, so the vector passes
through memory only once.
"""

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from offsite.errors import ConfigError

KEY_BYTES = 32
CHUNK_BYTES = 1 << 20
_WORD_BYTES = 4
_BLOCK_BYTES = 16  # update_into asks for this much room after the output
_ZERO_IV = bytes(_BLOCK_BYTES)


class Keystream:
    """The keystream of one key as little-endian 32-bit words; NIST SP 800-38A, section 6.5, with initial counter 0.

    Args:
      key: 32 bytes, used for this stream only.
      chunk: most bytes that one call of `words` gives.
      initial: initial counter block, 16 bytes.
    """

    def __init__(self, key: bytes, *, chunk: int = CHUNK_BYTES, initial: bytes = _ZERO_IV) -> None:
        self._encryptor = _encryptor(key, initial)
        self._buffers = _Buffers(chunk)

    def words(self, count: int) -> NDArray[np.uint32]:
        """Returns the next (count,) words; the array is overwritten by the next call."""
        self._encryptor.update_into(self._buffers.zeros[: _WORD_BYTES * count], self._buffers.room)
        return self._buffers.words[:count]


def add(total: NDArray[np.uint32], key: bytes) -> None:
    """Adds the mask of a key to ring elements, uint32 (d,), in place."""
    apply(total, added=(key,))


def subtract(total: NDArray[np.uint32], key: bytes) -> None:
    """Takes the mask of a key off ring elements, uint32 (d,), in place."""
    apply(total, subtracted=(key,))


def apply(total: NDArray[np.uint32], *, added: Sequence[bytes] = (), subtracted: Sequence[bytes] = ()) -> None:
    """Adds and subtracts the masks of many keys in place, modulo 2**32.

    Args:
      total: ring elements, uint32 (d,), contiguous; changed in place.
      added: 32-byte keys whose masks are added.
      subtracted: 32-byte keys whose masks are taken off.

    Raises:
      ConfigError: a key has the wrong length, or one key is given twice.
    """
    keys = (*added, *subtracted)
    if len(set(keys)) != len(keys):
        raise ConfigError("mask keys repeat; one key masks one vector once; derive the keys again")
    if total.ndim != 1 or total.dtype != np.uint32 or not total.flags.c_contiguous:
        raise ConfigError("ring elements must be a contiguous one-dimensional uint32 array; convert them")
    buffers = _Buffers(CHUNK_BYTES)
    plus = [_encryptor(key, _ZERO_IV) for key in added]
    minus = [_encryptor(key, _ZERO_IV) for key in subtracted]
    step = CHUNK_BYTES // _WORD_BYTES
    for start in range(0, total.size, step):
        part = total[start : start + step]
        zeros, words = buffers.zeros[: _WORD_BYTES * part.size], buffers.words[: part.size]
        for encryptor in plus:
            encryptor.update_into(zeros, buffers.room)
            np.add(part, words, out=part)
        for encryptor in minus:
            encryptor.update_into(zeros, buffers.room)
            np.subtract(part, words, out=part)


def _encryptor(key: bytes, initial: bytes) -> CipherContext:
    if len(key) != KEY_BYTES:
        raise ConfigError(f"key={len(key)} bytes; a mask key has {KEY_BYTES}; derive it again")
    return Cipher(algorithms.AES256(key), modes.CTR(initial)).encryptor()


class _Buffers:
    """One block of zeros and one block of output, reused for every chunk and every key."""

    def __init__(self, size: int) -> None:
        self.zeros = memoryview(bytes(size))
        self.room = bytearray(size + _BLOCK_BYTES)
        self.words: NDArray[np.uint32] = np.frombuffer(self.room, dtype="<u4", count=size // _WORD_BYTES)
