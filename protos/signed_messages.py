"""Every message between coordinator and site: signed by its sender and addressed to one recipient.

Flower 1.41 signs a time stamp and not the message, and keeps no list of messages that it has seen. So neither Flower
nor TLS below it proves who wrote a message. Audit logs, and errors that land there, call a signed message a letter.
"""

import hashlib

from offsite.errors import ProtocolViolation
from offsite.protos.codec import SignedMessage, decode_signed_message, encode_signed_message
from offsite.trust.identity import Identity, verify
from offsite.trust.wire import Writer

COORDINATOR = "coordinator"
_LABEL = "offsite letter"


def write(
    identity: Identity, federation: bytes, *, sender: str, recipient: str, stage: str, number: int, body: bytes
) -> bytes:
    """Returns the bytes of a signed message.

    Args:
      identity: the sender's identity.
      federation: SHA-256 of the federation manifest, 32 bytes.
      sender: a site's name, or `COORDINATOR`.
      recipient: a site's name, or `COORDINATOR`.
      stage: name of the stage, a key in the recipient's table of stages.
      number: number of the message; the coordinator's only go up, and a site's answer repeats the number of the
        question.
      body: an envelope.
    """
    message = SignedMessage(federation, sender, recipient, stage, number, body)
    signature = identity.sign(_signed_bytes(message))
    return encode_signed_message(SignedMessage(federation, sender, recipient, stage, number, body, signature))


def read(data: bytes, federation: bytes, *, sender: str, key: bytes, recipient: str) -> SignedMessage:
    """Returns a message that the expected sender signed for this recipient under this federation manifest.

    Args:
      data: the message's bytes.
      federation: SHA-256 of the federation manifest, 32 bytes.
      sender: expected sender.
      key: the sender's Ed25519 public key, 32 bytes.
      recipient: expected recipient.

    Raises:
      MalformedMessage: the bytes are not a signed message of this version.
      ProtocolViolation: the message has another sender, recipient or federation, or a wrong signature.
    """
    message = decode_signed_message(data)
    for name, actual, expected in (("sender", message.sender, sender), ("recipient", message.recipient, recipient)):
        if actual != expected:
            raise ProtocolViolation(f"letter {name}={actual!r}: {expected!r} was expected here; drop the letter")
    if message.federation != federation:
        raise ProtocolViolation(
            f"letter federation={message.federation.hex()[:12]}: {federation.hex()[:12]} holds here; if a new epoch "
            "was made, the site's owner signs its welcome (offsite client sign) and starts the client again"
        )
    verify(key, _signed_bytes(message), message.signature, sender=message.sender)
    return message


def _signed_bytes(message: SignedMessage) -> bytes:
    writer = Writer().text(_LABEL).field(message.federation).text(message.sender).text(message.recipient)
    # the body's hash stands for the body, so that a masked vector is not copied to be signed
    return writer.text(message.stage).number(message.number).field(hashlib.sha256(message.body).digest()).done()
