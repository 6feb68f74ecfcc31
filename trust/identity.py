"""The long-term Ed25519 identity of a site, the only key that the others know before a round starts."""

from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from offsite.errors import ConfigError, ProtocolViolation

KEY_BYTES = 32
SIGNATURE_BYTES = 64


class Identity:
    """An Ed25519 signing key (RFC 8032) that `repr` does not show."""

    __slots__ = ("_key", "public")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public: bytes = key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> Self:
        """Returns a fresh identity from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Returns the identity of a raw 32-byte private key.

        Raises:
          ConfigError: the key is not 32 bytes long.
        """
        if len(raw) != KEY_BYTES:
            raise ConfigError(
                f"identity={len(raw)} bytes; an Ed25519 private key has {KEY_BYTES}; create the key again"
            )
        return cls(Ed25519PrivateKey.from_private_bytes(raw))

    def to_bytes(self) -> bytes:
        """Returns the raw 32-byte private key, for a file that only the site can read."""
        return self._key.private_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """Returns the 64-byte signature over a message."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"Identity(private=***, public={self.public.hex()})"


def verify(public: bytes, message: bytes, signature: bytes, *, sender: str) -> None:
    """Checks a signature over the bytes as they came in.

    Raises:
      ProtocolViolation: the signature is not the sender's over these bytes.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise ProtocolViolation(
            f"sender={sender!r} did not sign these bytes in this round; signatures must verify under the roster; "
            "drop the message and ask the site again"
        ) from error
