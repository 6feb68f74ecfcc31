"""Updates as integers modulo 2**32, such that the sum of all sites cannot wrap.

A value takes q bits with q + ceil(log2 n) <= 32, so the sum of n values stays inside the signed 32-bit range and the
decoded sum is the exact integer sum. Rounding is stochastic: its error has mean zero and does not add up over sites and
rounds.
"""

import hashlib
import math
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from offsite.errors import ConfigError, RangeError
from offsite.secagg.mask import Keystream

BITS = 32
CHUNK = 1 << 16  # coordinates at once; the float64 buffers of a chunk stay in the cache

Rounding = Callable[[int], NDArray[np.float64]]


def levels(members: int) -> int:
    """Returns the largest integer that one site may send: 2**(q-1) - 1 with q = 32 - ceil(log2 n)."""
    if not 1 <= members <= 1 << (BITS - 2):
        raise ConfigError(f"members={members}; one to 2**{BITS - 2} sites fit into the ring; change the cohort")
    return (1 << (BITS - 1 - (members - 1).bit_length())) - 1


def bound(clip: float) -> float:
    """Returns the clip as the nearest float32, since a float32 update that was clipped at `clip` must be accepted."""
    with np.errstate(over="ignore", under="ignore"):
        nearest = float(np.float32(clip))
    if not math.isfinite(nearest) or nearest < float(np.finfo(np.float32).tiny):
        raise ConfigError(f"clip={clip!r}; a finite, normal float32 above zero is needed; change the manifest")
    return nearest


def scale(clip: float, members: int) -> float:
    """Returns the integer steps per unit of an update; bound(clip) * scale never exceeds levels(members)."""
    top, edge = levels(members), bound(clip)
    factor = top / edge
    while factor * edge > top:
        factor = math.nextafter(factor, 0.0)
    return factor


def encode(
    update: NDArray[np.float32],
    *,
    clip: float,
    members: int,
    randomness: Rounding | None = None,
    length: int | None = None,
) -> NDArray[np.uint32]:
    """Returns an update as ring elements, stochastically rounded.

    Args:
      update: float32 (d,), every value finite and within [-clip, clip].
      clip: per-coordinate bound of the terms.
      members: number of invited sites, whose sum the ring must hold.
      randomness: source of n float64 values in [0, 1), for a simulation that must repeat itself; None uses a keystream
        under a fresh key of the operating system.
      length: agreed d; None allows any.

    Raises:
      RangeError: wrong shape or dtype, or a value that is not finite or out of range; nothing is clipped silently.
    """
    check(update, clip=clip, length=length)
    factor, top = scale(clip, members), float(levels(members))
    draw: Rounding = _Uniform() if randomness is None else _Checked(randomness)
    ring = np.empty(update.shape, dtype=np.uint32)
    signed = ring.view(np.int32)
    buffer = np.empty(min(CHUNK, update.size), dtype=np.float64)
    for start in range(0, update.size, CHUNK):
        part = update[start : start + CHUNK]
        values = buffer[: part.size]
        np.copyto(values, part)  # converting first is faster than a multiplication that converts
        np.multiply(values, factor, out=values)
        np.add(values, draw(part.size), out=values)
        np.floor(values, out=values)
        # Adding a draw close to one can itself round up to top + 1; the update was checked above.
        np.minimum(values, top, out=values)
        signed[start : start + CHUNK] = values
    return ring


def check(update: NDArray[np.float32], *, clip: float, length: int | None = None) -> None:
    """Checks shape, dtype and range of an update, without a copy.

    Raises:
      RangeError: the update may not be sent; the message holds no value of the update.
    """
    if not isinstance(update, np.ndarray) or update.ndim != 1 or update.dtype != np.float32:
        raise RangeError("update is not a one-dimensional float32 array; flatten and convert it")
    if update.size == 0 or (length is not None and update.size != length):
        raise RangeError(f"length={update.size}; the terms say {length or 'at least 1'}; use the agreed adapter layout")
    edge = np.float32(bound(clip))
    for start in range(0, update.size, CHUNK):
        part = update[start : start + CHUNK]
        # Written so that NaN fails as well: a comparison with NaN is false.
        if not (part.max() <= edge and part.min() >= -edge):
            raise RangeError(
                f"clip={clip}; an update has a value outside the clip or not finite; clip or repair the update"
            )


def decode(total: NDArray[np.uint32], *, clip: float, members: int, summed: int) -> NDArray[np.float64]:
    """Returns the sum of updates from the sum of their ring elements.

    Args:
      total: unmasked sum modulo 2**32, uint32 (d,).
      clip: per-coordinate bound of the terms.
      members: number of invited sites, as in `encode`.
      summed: number of sites in this sum, 1 <= summed <= members.

    Raises:
      RangeError: a coordinate is larger than this many sites can make it, so a mask is left in the sum.
    """
    if not 1 <= summed <= members:
        raise RangeError(f"summed={summed} of members={members}; a sum has from 1 to all members; check the survivors")
    signed = total.view(np.int32)
    reach = summed * levels(members)
    if signed.size and (int(signed.max()) > reach or int(signed.min()) < -reach):
        raise RangeError(f"summed={summed} sites cannot make a sum this large; a mask is left in it; repeat the round")
    decoded = signed.astype(np.float64)
    decoded /= scale(clip, members)
    return decoded


def digest(vector: NDArray[np.uint32]) -> bytes:
    """Returns the SHA-256 over the little-endian bytes of ring elements, (d,)."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<u4").data).digest()


class _Uniform:
    """Uniform float64 in [0, 1 - 2**-32] from AES-256-CTR under a fresh key; the next call reuses the array."""

    def __init__(self) -> None:
        self._stream = Keystream(os.urandom(32), chunk=4 * CHUNK)
        self._values = np.empty(CHUNK, dtype=np.float64)

    def __call__(self, count: int) -> NDArray[np.float64]:
        values = self._values[:count]
        np.copyto(values, self._stream.words(count))
        return np.multiply(values, 2.0**-32, out=values)


class _Checked:
    """A caller's randomness, refused when it breaks what `encode` documents."""

    def __init__(self, randomness: Rounding) -> None:
        self._randomness = randomness

    def __call__(self, count: int) -> NDArray[np.float64]:
        values = np.asarray(self._randomness(count), dtype=np.float64)
        if values.shape != (count,) or not (values.min() >= 0.0 and values.max() < 1.0):
            raise RangeError(f"rounding must give {count} numbers in [0, 1); repair the randomness passed in")
        return values
