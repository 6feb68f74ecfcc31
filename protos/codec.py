"""The one reader and writer of the generated stubs: messages of a round <-> bytes, versioned and size-limited."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from errors import MalformedMessage
from protos import round_pb2 as wire

VERSION = 1
MAX_BYTES = 1 << 30
DIGEST_BYTES = 32


@dataclass(frozen=True)
class TrainRequest:
    """Asks a site to train from an adapter: job digest (32 bytes), round from 1, float32 vector of shape (d,)."""

    job: bytes
    round: int
    adapter: np.ndarray


@dataclass(frozen=True)
class TrainReply:
    """Says that a site holds a finished update of a round; nothing about the data travels."""

    round: int


@dataclass(frozen=True)
class KeysRequest:
    """Opens secure aggregation of a round's updates among the sites that finished training."""

    round: int
    sequence: int
    nonce: bytes
    adapter: bytes
    invited: tuple[str, ...]


@dataclass(frozen=True)
class SignedBytes:
    """A signed secure-aggregation message; body and signature pass through untouched."""

    sender: str
    body: bytes
    signature: bytes


@dataclass(frozen=True)
class SignedBatch:
    """Several signed messages, in the order in which they were given."""

    messages: tuple[SignedBytes, ...]


@dataclass(frozen=True)
class MaskedReply:
    """A signed commitment and the masked vector, uint32 of shape (d,)."""

    commitment: SignedBytes
    vector: np.ndarray


@dataclass(frozen=True)
class Announcement:
    """The collector's list of survivors, as the members will sign it."""

    body: bytes


@dataclass(frozen=True)
class Refusal:
    """A site's refusal: name of the error and one line without private data."""

    kind: str
    reason: str


Message = TrainRequest | TrainReply | KeysRequest | SignedBatch | MaskedReply | Announcement | Refusal


def encode(message: Message) -> bytes:
    """Writes a message as the bytes of a versioned envelope; the same message always gives the same bytes."""
    envelope = wire.Envelope(version=VERSION)
    match message:
        case TrainRequest():
            content = wire.TrainRequest(job=message.job, round=message.round, adapter=_floats(message.adapter))
            envelope.train_request.CopyFrom(content)
        case TrainReply():
            envelope.train_reply.CopyFrom(wire.TrainReply(round=message.round))
        case KeysRequest():
            envelope.keys_request.CopyFrom(
                wire.KeysRequest(
                    round=message.round,
                    sequence=message.sequence,
                    nonce=message.nonce,
                    adapter=message.adapter,
                    invited=message.invited,
                )
            )
        case SignedBatch():
            envelope.signed_batch.CopyFrom(wire.SignedBatch(messages=[_signed(m) for m in message.messages]))
        case MaskedReply():
            vector = np.ascontiguousarray(message.vector, dtype="<u4").tobytes()
            envelope.masked_reply.CopyFrom(wire.MaskedReply(commitment=_signed(message.commitment), vector=vector))
        case Announcement():
            envelope.announcement.CopyFrom(wire.Announcement(body=message.body))
        case Refusal():
            envelope.refusal.CopyFrom(wire.Refusal(kind=message.kind, reason=message.reason))
    return envelope.SerializeToString(deterministic=True)


def decode(data: bytes) -> Message:
    """Reads the bytes of an envelope.

    Raises:
      MalformedMessage: too long, not an envelope, another version, unknown fields, or a field of the wrong length. The
        check is strict: bytes that `encode` would not have written are refused.
    """
    if len(data) > MAX_BYTES:
        raise MalformedMessage(
            f"message_bytes={len(data)}: above the limit {MAX_BYTES}; send one round's vector at most"
        )
    envelope = wire.Envelope()
    try:
        envelope.ParseFromString(data)
    except DecodeError as error:
        raise MalformedMessage("message does not parse as an envelope; was it cut off") from error
    if envelope.version != VERSION:
        raise MalformedMessage(f"version={envelope.version}: this side speaks {VERSION}; install the same release")
    message = _content(envelope)
    if encode(message) != data:
        raise MalformedMessage("message is not in canonical form; was it altered on the way")
    return message


def _content(envelope: wire.Envelope) -> Message:  # noqa: PLR0911 - one return per kind of message
    match envelope.WhichOneof("content"):
        case "train_request":
            request = envelope.train_request
            return TrainRequest(_digest(request.job), request.round, _vector(request.adapter, "<f4"))
        case "train_reply":
            return TrainReply(envelope.train_reply.round)
        case "keys_request":
            keys = envelope.keys_request
            nonce, adapter = _digest(keys.nonce), _digest(keys.adapter)
            return KeysRequest(keys.round, keys.sequence, nonce, adapter, tuple(keys.invited))
        case "signed_batch":
            return SignedBatch(_batch(envelope.signed_batch.messages))
        case "masked_reply":
            reply = envelope.masked_reply
            return MaskedReply(_batch([reply.commitment])[0], _vector(reply.vector, "<u4"))
        case "announcement":
            return Announcement(envelope.announcement.body)
        case "refusal":
            return Refusal(envelope.refusal.kind, envelope.refusal.reason)
    raise MalformedMessage("message has no content that this version knows; install the same release on both sides")


def _batch(messages: Sequence[wire.Signed]) -> tuple[SignedBytes, ...]:
    return tuple(SignedBytes(m.sender, m.body, m.signature) for m in messages)


def _signed(message: SignedBytes) -> wire.Signed:
    return wire.Signed(sender=message.sender, body=message.body, signature=message.signature)


def _floats(vector: np.ndarray) -> bytes:
    return np.ascontiguousarray(vector, dtype="<f4").tobytes()


def _vector(data: bytes, dtype: str) -> np.ndarray:
    if len(data) % 4:
        raise MalformedMessage(f"vector_bytes={len(data)}: not a whole number of 32-bit entries; was it cut off")
    return np.frombuffer(data, dtype=dtype)


def _digest(data: bytes) -> bytes:
    if len(data) != DIGEST_BYTES:
        raise MalformedMessage(f"digest_bytes={len(data)}: a SHA-256 has {DIGEST_BYTES}; was it cut off")
    return data
