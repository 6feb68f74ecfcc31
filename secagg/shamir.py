"""Shamir's secret sharing over the order of P-256, in Python integers; Shamir 1979, RFC 9591 appendix C.

The field is that of the FROST(P-256) vectors of RFC 9591, which the tests reproduce. An X25519 key is below 2**255 and
a self-mask seed is drawn below the order, so each secret is one field element.
"""

import secrets
from collections.abc import Iterable, Mapping, Sequence

from offsite.errors import ConfigError, ProtocolViolation, TooFewSurvivors

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
SHARE_BYTES = 32


def split(secret: int, *, threshold: int, points: Iterable[int]) -> dict[int, int]:
    """Returns one share per point; any `threshold` shares give the secret, and fewer say nothing about it.

    Args:
      secret: field element, 0 <= secret < ORDER.
      threshold: number of shares that give the secret, >= 1.
      points: distinct numbers, 1 <= point < ORDER, at least `threshold` of them.

    Raises:
      ConfigError: a number is out of range, or there are too few points.
    """
    places = list(points)
    if not 0 <= secret < ORDER or not 1 <= threshold <= len(places):
        raise ConfigError(
            f"threshold={threshold} of points={len(places)}; 1 <= threshold <= points, and a secret in the field"
        )
    if len(set(places)) != len(places) or not all(1 <= place < ORDER for place in places):
        raise ConfigError(f"points={len(places)} repeat or leave the field; use the numbers 1 to n")
    coefficients = [secret, *(secrets.randbelow(ORDER) for _ in range(threshold - 1))]
    return {place: evaluate(coefficients, place) for place in places}


def evaluate(coefficients: Sequence[int], point: int) -> int:
    """Returns the value of a polynomial at a point by Horner's rule; coefficients start with the constant term."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % ORDER
    return value


def combine(shares: Mapping[int, int], *, threshold: int) -> int:
    """Returns the secret of the shares, by Lagrange interpolation at zero.

    A share that was changed gives another secret, so the caller compares the result with the announced secret.

    Args:
      shares: share by point, at least `threshold`; all are used.
      threshold: number of shares that give the secret.

    Raises:
      TooFewSurvivors: there are fewer shares than the threshold.
      ProtocolViolation: a point or share is not in the field.
    """
    if len(shares) < threshold:
        raise TooFewSurvivors(f"shares={len(shares)}; {threshold} are needed to reconstruct; repeat the round")
    if not all(1 <= point < ORDER and 0 <= share < ORDER for point, share in shares.items()):
        raise ProtocolViolation("share out of the field; points start at 1 and shares are below the order of P-256")
    secret = 0
    for point, share in shares.items():
        above, below = 1, 1
        for other in shares:
            if other != point:
                above = above * other % ORDER
                below = below * (other - point) % ORDER
        secret = (secret + share * above * pow(below, -1, ORDER)) % ORDER
    return secret


def to_bytes(share: int) -> bytes:
    """Returns a field element as 32 big-endian bytes."""
    return share.to_bytes(SHARE_BYTES, "big")


def from_bytes(data: bytes) -> int:
    """Returns the field element of 32 big-endian bytes.

    Raises:
      ProtocolViolation: the bytes are not a field element.
    """
    value = int.from_bytes(data, "big")
    if len(data) != SHARE_BYTES or value >= ORDER:
        raise ProtocolViolation("share out of the field; 32 bytes below the order of P-256 are needed; drop the site")
    return value
