"""The ephemeral keys of a round and all keys derived from them, each bound to the transcript T1 and to its use."""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from offsite.errors import ProtocolViolation
from offsite.secagg import shamir, signed_bodies
from offsite.secagg.params import SecAggParams
from offsite.secagg.signed_bodies import Keys, Signed
from offsite.trust.wire import Writer

_ROSTER, _COMMIT = "offsite secagg roster", "offsite secagg commit"
_SEAL, _PAIR, _SELF = "offsite secagg share", "offsite secagg pair", "offsite secagg self"
_SCALAR_BYTES = 32
_NONCE = bytes(12)  # a sealing key serves one direction of one round and seals once


@dataclass(frozen=True)
class Agreed:
    """The frozen set U1.

    Attributes:
      transcript: the transcript hash T1, 32 bytes.
      keys: verified public keys by site.
    """

    transcript: bytes
    keys: dict[str, Keys]


def check_keys(terms: SecAggParams, message: Signed) -> Keys:
    """Returns the keys of a message that an invited site signed for these terms.

    Raises:
      ProtocolViolation: the site is unknown, or its signature is wrong, also for being of another round, federation,
        model or manifest.
      MalformedMessage: the body is not a keys message.
    """
    public = terms.public_key(message.sender)
    if public is None:
        raise ProtocolViolation(f"sender={message.sender!r} is not invited to this round; drop the message")
    signed_bodies.check(public, signed_bodies.KEYS, terms.t0(), message)
    return Keys.from_bytes(message.body)


def agree(terms: SecAggParams, signed: Sequence[Signed]) -> Agreed:
    """Returns what all sites of U1 share: T1 = H(label, T0, signed key messages sorted by site) and their keys.

    Raises:
      ProtocolViolation: a message is not valid, a site occurs twice, or one public key is used twice.
      MalformedMessage: a body is not a keys message.
    """
    keys = {message.sender: check_keys(terms, message) for message in signed}
    points = [point for each in keys.values() for point in (each.channel, each.mask)]
    if len(keys) != len(signed) or len(set(points)) != len(points):
        raise ProtocolViolation(
            f"roster of {len(signed)} messages repeats a site or a key; each site has its own keys; stop here"
        )
    writer = Writer().text(_ROSTER).field(terms.t0())
    for message in sorted(signed, key=lambda each: each.sender):
        writer.field(message.to_bytes())
    return Agreed(hashlib.sha256(writer.done()).digest(), keys)


def new_scalar() -> int:
    """Returns a clamped X25519 private key as a number below 2**255, so that it is a field element of `shamir`."""
    return clamp(int.from_bytes(secrets.token_bytes(_SCALAR_BYTES), "little"))


def clamp(number: int) -> int:
    """Returns the number as X25519 reads it: a multiple of 8 from 2**254 below 2**255; RFC 7748, section 5."""
    return number % (1 << 254) // 8 * 8 + (1 << 254)


def private_of(scalar: int) -> X25519PrivateKey:
    """Returns the X25519 key of a scalar; making a key costs as much as an exchange, so callers keep it."""
    return X25519PrivateKey.from_private_bytes(scalar.to_bytes(_SCALAR_BYTES, "little"))


def public_of(scalar: int) -> bytes:
    """Returns the raw X25519 public key of a scalar."""
    return private_of(scalar).public_key().public_bytes_raw()


def exchange(private: X25519PrivateKey, public: bytes, *, peer: str) -> bytes:
    """Returns the X25519 secret with a peer; RFC 7748.

    Raises:
      ProtocolViolation: the peer sent a point of low order, with which everybody would know the secret.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ProtocolViolation(
            f"sender={peer!r} sent a low-order point, and everybody would know a secret made with it; drop the site"
        ) from error


def commit(terms: SecAggParams, site: str, seed: int) -> bytes:
    """Returns H(b), the hash that fixes a site's self-mask seed before anyone answers."""
    return hashlib.sha256(
        Writer().text(_COMMIT).field(terms.t0()).text(site).field(shamir.to_bytes(seed)).done()
    ).digest()


def self_key(seed: int, transcript: bytes, site: str) -> bytes:
    """Returns the key of a site's self-mask."""
    return _derive(shamir.to_bytes(seed), transcript, _SELF, site)


def pair_key(secret: bytes, transcript: bytes, first: str, second: str) -> bytes:
    """Returns the key of the mask of two sites; both sites derive the same key."""
    return _derive(secret, transcript, _PAIR, *sorted((first, second)))


def seal(secret: bytes, transcript: bytes, sender: str, recipient: str, shares: tuple[int, int]) -> bytes:
    """Returns the two shares of a sender, sealed for one recipient of this round."""
    key, context = _sealing(secret, transcript, sender, recipient)
    return AESGCM(key).encrypt(_NONCE, b"".join(shamir.to_bytes(share) for share in shares), context)


def unseal(secret: bytes, transcript: bytes, sender: str, recipient: str, sealed: bytes) -> tuple[int, int]:
    """Returns the two shares that a sender sealed for this recipient.

    Raises:
      ProtocolViolation: the ciphertext was made by or for another site, for another round, or was changed.
    """
    key, context = _sealing(secret, transcript, sender, recipient)
    try:
        plain = AESGCM(key).decrypt(_NONCE, sealed, context)
    except InvalidTag as error:
        raise ProtocolViolation(
            f"sender={sender!r} has no share for recipient={recipient!r} in this ciphertext; drop the site and repeat"
        ) from error
    size = shamir.SHARE_BYTES
    return shamir.from_bytes(plain[:size]), shamir.from_bytes(plain[size:])


def _sealing(secret: bytes, transcript: bytes, sender: str, recipient: str) -> tuple[bytes, bytes]:
    context = Writer().text(_SEAL).field(transcript).text(sender).text(recipient).done()
    return _derive(secret, transcript, _SEAL, sender, recipient), context


def _derive(secret: bytes, transcript: bytes, label: str, *sites: str) -> bytes:
    writer = Writer().text(label).field(transcript)
    for site in sites:
        writer.text(site)
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=transcript, info=writer.done()).derive(secret)
