"""Letters: every message between coordinator and site, signed by its sender and addressed to one recipient.

Flower 1.41 signs a time stamp and not the message, and keeps no list of what it has seen; so neither it nor TLS below
it is relied on for who said what.
"""

import hashlib

from offsite.errors import ProtocolViolation
from offsite.protos.codec import SignedMessage, decode_letter, encode_letter
from offsite.trust.identity import Identity, verify
from offsite.trust.wire import Writer

COORDINATOR = "coordinator"
_LABEL = "offsite letter"


def write(
    identity: Identity, federation: bytes, *, sender: str, recipient: str, stage: str, number: int, body: bytes
) -> bytes:
    """Returns the bytes of a signed letter.

    Args:
      identity: of the sender.
      federation: SHA-256 of the federation manifest, 32 bytes.
      sender: a site's name, or `COORDINATOR`.
      recipient: likewise.
      stage: what it is about; a name in the recipient's table of stages.
      number: of the coordinator's letters ever higher; a site's answer repeats the number that it answers.
      body: an envelope.
    """
    letter = SignedMessage(federation, sender, recipient, stage, number, body)
    signature = identity.sign(_signed_bytes(letter))
    return encode_letter(SignedMessage(federation, sender, recipient, stage, number, body, signature))


def read(data: bytes, federation: bytes, *, sender: str, key: bytes, recipient: str) -> SignedMessage:
    """Returns a letter that the expected sender signed for this recipient under this federation manifest.

    Raises:
      MalformedMessage: the bytes are not a letter of this version.
      ProtocolViolation: another sender, recipient or federation, or a wrong signature.
    """
    letter = decode_letter(data)
    for name, found, expected in (("sender", letter.sender, sender), ("recipient", letter.recipient, recipient)):
        if found != expected:
            raise ProtocolViolation(f"letter {name}={found!r}: {expected!r} was expected here; drop the letter")
    if letter.federation != federation:
        raise ProtocolViolation(
            f"letter federation={letter.federation.hex()[:12]}: {federation.hex()[:12]} holds here; if a new epoch was "
            "made, the site's owner signs its welcome (offsite client sign) and starts the client again"
        )
    verify(key, _signed_bytes(letter), letter.signature, sender=letter.sender)
    return letter


def _signed_bytes(letter: SignedMessage) -> bytes:
    writer = Writer().text(_LABEL).field(letter.federation).text(letter.sender).text(letter.recipient)
    # the body's hash stands for the body, so that a masked vector is not copied to be signed
    return writer.text(letter.stage).number(letter.number).field(hashlib.sha256(letter.body).digest()).done()
