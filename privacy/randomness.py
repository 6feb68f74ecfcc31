"""The source of every random number that a privacy guarantee rests on."""

import hashlib
import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


class Randomness:
    """Uniform and normal numbers from an AES-256-CTR keystream.

    Use one of the two constructors. A generator that a peer could seed would let that peer subtract the noise, so the
    name of the only seeded constructor says what it is for.

    Attributes:
      seeded: whether the numbers can be computed again from a seed; a report of such a run claims no privacy.
    """

    def __init__(self, key: bytes, *, seeded: bool) -> None:
        # One key serves one stream, so the counter may start at 0.
        self._stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
        self.seeded = seeded

    @classmethod
    def from_os(cls) -> "Randomness":
        """Returns randomness under a fresh 256-bit key of the operating system, for use on private data."""
        return cls(os.urandom(32), seeded=False)

    @classmethod
    def for_simulation(cls, seed: int, *labels: str) -> "Randomness":
        """Returns repeatable randomness, for simulations and tests only: whoever knows the seed knows the noise.

        Args:
          seed: any integer.
          labels: words that name the use; each tuple of labels has a stream of its own.
        """
        digest = hashlib.sha256(b"offsite/randomness/simulation/1")
        for label in (str(seed), *labels):
            text = label.encode()
            digest.update(len(text).to_bytes(8, "big") + text)
        return cls(digest.digest(), seeded=True)

    def uniform(self, n: int) -> np.ndarray:
        """Returns n independent numbers in the open interval (0, 1), float64 (n,), on a grid of 2**-52."""
        words = np.frombuffer(self._stream.update(bytes(8 * n)), dtype="<u8")
        numbers = (words >> np.uint64(12)).astype(np.float64)
        # The half step keeps 0 out, since Box-Muller takes a logarithm. In place: millions are drawn for a step.
        numbers += 0.5
        numbers *= 2.0**-52
        return numbers

    def normal(self, n: int) -> np.ndarray:
        """Returns n independent standard normal numbers, float64 (n,).

        Box and Muller 1958. The grid of the uniforms bounds the numbers by 8.6, beyond which 1e-17 of a normal's mass
        lies.
        """
        half = (n + 1) // 2
        # torch's functions of float64 take half of numpy's time where the processor has no AVX-512
        radius = torch.from_numpy(self.uniform(half)).log_().mul_(-2).sqrt_()
        angle = torch.from_numpy(self.uniform(half)).mul_(2 * math.pi)
        numbers = torch.empty(2 * half, dtype=torch.float64)
        torch.mul(torch.cos(angle), radius, out=numbers[:half])
        torch.mul(angle.sin_(), radius, out=numbers[half:])
        return numbers[:n].numpy()
