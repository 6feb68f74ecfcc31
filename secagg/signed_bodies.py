"""The signed bodies of a secure aggregation, and how each body is written and read.

A receiver checks the signature over the bytes that came in and parses them afterwards; nothing is serialised again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from offsite.errors import MalformedMessage
from offsite.secagg import shamir
from offsite.secagg.params import DIGEST_BYTES
from offsite.trust.identity import SIGNATURE_BYTES, Identity, verify
from offsite.trust.wire import MAX_BODY_BYTES, Reader, Writer

KEYS, SHARES, MASKED, SURVIVORS, UNMASK = "keys", "shares", "masked", "survivors", "unmask"
SELF_MASK, MASK_KEY = b"self", b"mask"
POINT_BYTES = 32
SEALED_BYTES = 2 * shamir.SHARE_BYTES + 16
_SIGNED = "offsite secagg signed"


@dataclass(frozen=True)
class Signed:
    """A message of one site.

    Attributes:
      sender: id of the site.
      body: the message's content, canonical bytes.
      signature: Ed25519 signature over step, context (T0 or T1), sender and body.
    """

    sender: str
    body: bytes
    signature: bytes

    def to_bytes(self) -> bytes:
        """Returns the message for the wire."""
        return Writer().text(self.sender).field(self.body).field(self.signature).done()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Returns the message of wire bytes; the caller checks the signature with `check`.

        Raises:
          MalformedMessage: the bytes are not one whole message.
        """
        reader = Reader(data, "signed", limit=MAX_BODY_BYTES + 512)
        message = cls(reader.text(), reader.field(), reader.field(exactly=SIGNATURE_BYTES))
        reader.end()
        return message


def sign(identity: Identity, step: str, context: bytes, sender: str, body: bytes) -> Signed:
    """Returns a body signed for one step of one round."""
    return Signed(sender, body, identity.sign(_signing_input(step, context, sender, body)))


def check(public: bytes, step: str, context: bytes, message: Signed) -> None:
    """Checks that a message was signed for this step of this round.

    Raises:
      ProtocolViolation: the signature is another key's, or covers another step, round, sender or body.
    """
    verify(
        public, _signing_input(step, context, message.sender, message.body), message.signature, sender=message.sender
    )


def _signing_input(step: str, context: bytes, sender: str, body: bytes) -> bytes:
    return Writer().text(_SIGNED).text(step).field(context).text(sender).field(body).done()


@dataclass(frozen=True)
class Keys:
    """Ephemeral public keys of a site.

    Attributes:
      channel: X25519 key under which shares are sealed, 32 bytes.
      mask: X25519 key of the pair masks, 32 bytes.
      commitment: hash of the site's self-mask seed, 32 bytes.
    """

    channel: bytes
    mask: bytes
    commitment: bytes

    def to_bytes(self) -> bytes:
        """Returns the body of a keys message."""
        return Writer().field(self.channel).field(self.mask).field(self.commitment).done()

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        """Returns the keys of a keys message's body.

        Raises:
          MalformedMessage: the bytes are no such body.
        """
        reader = Reader(body, KEYS)
        keys = cls(*(reader.field(exactly=size) for size in (POINT_BYTES, POINT_BYTES, DIGEST_BYTES)))
        reader.end()
        return keys


def write_sealed(sealed: Mapping[str, bytes]) -> bytes:
    """Returns the body of a shares message: recipients and ciphertexts, in order of the recipients."""
    writer = Writer()
    for site in sorted(sealed):
        writer.text(site).field(sealed[site])
    return writer.done()


def read_sealed(body: bytes) -> dict[str, bytes]:
    """Returns the ciphertexts of a shares message by recipient."""
    reader = Reader(body, SHARES)
    sealed: dict[str, bytes] = {}
    while reader.more():
        site = _next(reader.text(), sealed, SHARES)
        sealed[site] = reader.field(exactly=SEALED_BYTES)
    return sealed


def write_announcement(transcript: bytes, digests: Mapping[str, bytes]) -> bytes:
    """Returns the survivor set with the SHA-256 of every survivor's upload, for the round with transcript T1."""
    writer = Writer().field(transcript)
    for site in sorted(digests):
        writer.text(site).field(digests[site])
    return writer.done()


def read_announcement(body: bytes) -> tuple[bytes, dict[str, bytes]]:
    """Returns T1 and the upload digests by survivor."""
    reader = Reader(body, SURVIVORS)
    transcript = reader.field(exactly=DIGEST_BYTES)
    digests: dict[str, bytes] = {}
    while reader.more():
        site = _next(reader.text(), digests, SURVIVORS)
        digests[site] = reader.field(exactly=DIGEST_BYTES)
    return transcript, digests


def write_released(released: Mapping[str, tuple[bytes, int]]) -> bytes:
    """Returns the body of an unmask message: the self-mask share or the mask-key share of each site."""
    writer = Writer()
    for site in sorted(released):
        kind, share = released[site]
        writer.text(site).field(kind).field(shamir.to_bytes(share))
    return writer.done()


def read_released(body: bytes) -> dict[str, tuple[bytes, int]]:
    """Returns kind and share by site; a site occurs once, so no site can be both survivor and dropped."""
    reader = Reader(body, UNMASK)
    released: dict[str, tuple[bytes, int]] = {}
    while reader.more():
        site = _next(reader.text(), released, UNMASK)
        kind = reader.field(exactly=len(SELF_MASK))
        if kind not in (SELF_MASK, MASK_KEY):
            raise MalformedMessage(f"message={UNMASK} has an unknown kind of share; drop its sender")
        released[site] = (kind, shamir.from_bytes(reader.field(exactly=shamir.SHARE_BYTES)))
    return released


def _next(site: str, before: Mapping[str, object], what: str) -> str:
    if before and site <= max(before):
        raise MalformedMessage(f"message={what} has site={site!r} twice or out of order; ids go up; drop its sender")
    return site
