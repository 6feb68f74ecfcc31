"""Sealed boxes, which only one site can open: HPKE in base mode (RFC 9180).

Suite 1 is X25519. Suite 2 is X-Wing (draft-connolly-cfrg-xwing-kem: ML-KEM-768 and X25519 together), which stays closed
even to somebody who records today and has a quantum computer later. Both use HKDF-SHA256 and AES-256-GCM.
"""

from hashlib import shake_256
from secrets import token_bytes
from typing import Self

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from offsite.errors import Untrusted, lookup

CLASSIC, HYBRID = 1, 2
SEED_BYTES = 32
_MLKEM_PUBLIC, _MLKEM_SEED = 1184, 64
PUBLIC_BYTES = {CLASSIC: 32, HYBRID: _MLKEM_PUBLIC + 32}
_SUITES = {
    str(CLASSIC): hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM),
    str(HYBRID): hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM),
}
_FAILURES = (InvalidTag, UnsupportedAlgorithm, ValueError, TypeError, OverflowError)
PrivateKey = X25519PrivateKey | hpke.MLKEM768X25519PrivateKey
PublicKey = X25519PublicKey | hpke.MLKEM768X25519PublicKey


class SealingKey:
    """A private key that opens sealed boxes and that `repr` does not show."""

    __slots__ = ("_key", "_seed", "public", "suite")

    def __init__(self, suite: int, seed: bytes) -> None:
        lookup(_SUITES, str(suite), "suite")
        self.suite, self._seed = suite, seed
        self._key, self.public = _expand(suite, seed)

    @classmethod
    def generate(cls, suite: int) -> Self:
        """Returns a fresh key from the operating system's randomness; `suite` is 1 or 2.

        Raises:
          UnknownName: no such suite.
        """
        return cls(suite, token_bytes(SEED_BYTES))

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Returns the key that `to_bytes` wrote.

        Raises:
          Untrusted: the bytes are no sealing key.
        """
        if len(raw) != 1 + SEED_BYTES or raw[0] not in PUBLIC_BYTES:
            raise Untrusted(f"sealing={len(raw)} bytes; a sealing key has {1 + SEED_BYTES}; restore the file or rotate")
        return cls(raw[0], raw[1:])

    def to_bytes(self) -> bytes:
        """Returns the suite and the 32-byte private seed, for a file that only the site can read."""
        return bytes([self.suite]) + self._seed

    def open(self, box: bytes, info: bytes) -> bytes:
        """Returns the plaintext of a box that was sealed to this key for this purpose.

        Raises:
          Untrusted: the box was sealed to another key, for another purpose, or was altered.
        """
        try:
            return _SUITES[str(self.suite)].decrypt(box, self._key, info)
        except _FAILURES as error:
            raise Untrusted(
                "a sealed box does not open; it is for another key or was altered; ask for it again"
            ) from error

    def __repr__(self) -> str:
        return f"SealingKey(suite={self.suite}, private=***, public={self.public[:8].hex()}…)"


def seal(suite: int, public: bytes, plaintext: bytes, info: bytes) -> bytes:
    """Returns a box that only the owner of a public key can open.

    Args:
      suite: 1 or 2.
      public: public sealing key, 32 bytes in suite 1, 1216 in suite 2.
      plaintext: the secret bytes.
      info: bytes that name the box's purpose; opening needs the same bytes.

    Raises:
      UnknownName: the suite is unknown.
      Untrusted: the public key is not usable.
    """
    chosen = lookup(_SUITES, str(suite), "suite")
    try:
        return chosen.encrypt(plaintext, read_public(suite, public), info)
    except _FAILURES as error:
        raise Untrusted(
            f"sealing key of suite {suite} is not a usable public key; refuse its owner's request"
        ) from error


def read_public(suite: int, public: bytes) -> PublicKey:
    """Returns a public key from its bytes.

    Raises:
      Untrusted: the bytes have the wrong length, or are no key.
    """
    if len(public) != PUBLIC_BYTES.get(suite):
        raise Untrusted(f"sealing key has {len(public)} bytes; suite {suite} has {PUBLIC_BYTES.get(suite)}; refuse it")
    try:
        if suite == CLASSIC:
            return X25519PublicKey.from_public_bytes(public)
        lattice = MLKEM768PublicKey.from_public_bytes(public[:_MLKEM_PUBLIC])
        return hpke.MLKEM768X25519PublicKey(lattice, X25519PublicKey.from_public_bytes(public[_MLKEM_PUBLIC:]))
    except _FAILURES as error:
        raise Untrusted(f"sealing key of suite {suite} is not a public key; refuse its owner's request") from error


def _expand(suite: int, seed: bytes) -> tuple[PrivateKey, bytes]:
    if suite == CLASSIC:
        plain = X25519PrivateKey.from_private_bytes(seed)
        return plain, plain.public_key().public_bytes_raw()
    stretched = shake_256(seed).digest(_MLKEM_SEED + 32)  # draft-connolly-cfrg-xwing-kem, section 5.2
    lattice = MLKEM768PrivateKey.from_seed_bytes(stretched[:_MLKEM_SEED])
    curve = X25519PrivateKey.from_private_bytes(stretched[_MLKEM_SEED:])
    public = lattice.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw()
    return hpke.MLKEM768X25519PrivateKey(lattice, curve), public
