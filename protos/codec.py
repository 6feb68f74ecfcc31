"""The only reader and writer of the generated stubs: messages to and from bytes, versioned and size-limited."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError

from offsite.errors import MalformedMessage
from offsite.protos import framing
from offsite.protos import round_pb2 as wire
from offsite.protos.messages import (
    LINE,
    MAX_BIASES,
    MAX_REFRESH_BYTES,
    NAME,
    Announcement,
    KeysRequest,
    LedgerHead,
    MaskedReply,
    Message,
    Notice,
    Offer,
    OfferReply,
    Refusal,
    SignedBatch,
    SignedMessage,
    TrainReply,
    TrainRequest,
    UpdateReply,
    UpdateRequest,
    one_line,
)
from offsite.secagg.signed_bodies import Signed
from offsite.trust import canonical
from offsite.trust.federation_manifest import MAX_SITES
from offsite.trust.sealing import HYBRID, PUBLIC_BYTES

__all__ = [
    "Announcement",
    "KeysRequest",
    "LedgerHead",
    "MaskedReply",
    "Message",
    "Notice",
    "Offer",
    "OfferReply",
    "Refusal",
    "Signed",
    "SignedBatch",
    "SignedMessage",
    "TrainReply",
    "TrainRequest",
    "UpdateReply",
    "UpdateRequest",
    "decode",
    "decode_signed_message",
    "encode",
    "encode_signed_message",
]
T = TypeVar("T")
K = TypeVar("K", wire.Refusal, wire.Notice)
VERSION = 2
DIGEST_BYTES = 32
MAX_ENTRIES = MAX_SITES  # most entries of any list, one per site


def encode(message: Message) -> bytes:
    """Writes a message as the bytes of a versioned envelope; the same message always gives the same bytes.

    Texts for people are written by `one_line`, so that a reason of any length is a message and not a crash.
    """
    tail = _TAILS[type(message)](message) if type(message) in _TAILS else b""
    head = _head_of(message, memoryview(tail).nbytes)
    return framing.join(head, tail)


def _head_of(message: Message, tail: int) -> bytes:
    name, write = _WRITERS[type(message)]
    envelope = wire.Envelope(version=VERSION, tail=tail)
    getattr(envelope, name).CopyFrom(write(message))
    return envelope.SerializeToString(deterministic=True)


def encode_signed_message(message: SignedMessage) -> bytes:
    """Writes a signed message; the same message always gives the same bytes."""
    return framing.join(_letter_head(message), message.body)


def _letter_head(message: SignedMessage) -> bytes:
    fields = _fields(message)
    tail = len(fields.pop("body"))
    return wire.Letter(version=VERSION, tail=tail, **fields).SerializeToString(deterministic=True)


def decode_signed_message(data: bytes) -> SignedMessage:
    """Reads the bytes of a signed message as strictly as `decode`; `signed_messages.read` checks the signature.

    Raises:
      MalformedMessage: as for `decode`.
    """
    head, tail = framing.split(data)
    parsed = wire.Letter()
    try:
        parsed.ParseFromString(head)
    except DecodeError as error:
        raise MalformedMessage("message does not parse as a letter; was it cut off") from error
    _check_version(parsed.version)
    names = (parsed.sender, parsed.recipient, parsed.stage)
    for name in names:  # audit logs and terminals show these names, also when nobody signed them
        canonical.text(name, "letter name", limit=NAME)
    framing.check_tail(parsed.tail, tail)
    read = SignedMessage(_digest(parsed.federation), *names, parsed.number, bytes(tail), parsed.signature)
    if _letter_head(read) != head:
        raise MalformedMessage("letter is not in canonical form; was it altered on the way")
    return read


def decode(data: bytes) -> Message:
    """Reads the bytes of an envelope.

    Raises:
      MalformedMessage: the bytes are too long, no envelope, or have another version, unknown fields, or a field of the
        wrong length. The check is strict: bytes that `encode` would not have written are refused.
    """
    head, tail = framing.split(data)
    envelope = wire.Envelope()
    try:
        envelope.ParseFromString(head)
    except DecodeError as error:
        raise MalformedMessage("message does not parse as an envelope; was it cut off") from error
    _check_version(envelope.version)
    framing.check_tail(envelope.tail, tail)
    message = _content(envelope, tail)
    if _head_of(message, len(tail)) != head:
        raise MalformedMessage("message is not in canonical form; was it altered on the way")
    return message


def _content(envelope: wire.Envelope, tail: memoryview) -> Message:
    name = envelope.WhichOneof("content")
    if name in _LONG_READERS:
        return _LONG_READERS[name](getattr(envelope, name), tail)
    if len(tail):
        raise MalformedMessage(f"tail_bytes={len(tail)}: this message has none; refuse it")
    if name not in _READERS:
        raise MalformedMessage("message has no content that this version knows; install the same release on both sides")
    return _READERS[name](getattr(envelope, name))


def _train_request(request: wire.TrainRequest, tail: memoryview) -> TrainRequest:
    return TrainRequest(_digest(request.job), request.round, _vector(tail, "<f4"), _refresh(request.refresh))


def _write_train_request(message: TrainRequest) -> wire.TrainRequest:
    moved = [wire.Bias(name=name, values=values) for name, values in message.refresh]
    return wire.TrainRequest(job=message.job, round=message.round, refresh=moved)


def _refresh(moved: Sequence[wire.Bias]) -> tuple[tuple[str, bytes], ...]:
    """Reads moved biases; only an owner of the emulator can tell whether these biases may move."""
    size = sum(len(bias.values) for bias in moved)
    if len(moved) > MAX_BIASES or size > MAX_REFRESH_BYTES:
        raise MalformedMessage(
            f"refresh tensors={len(moved)} bytes={size}: at most {MAX_BIASES} and {MAX_REFRESH_BYTES}; refuse it"
        )
    names = [canonical.text(bias.name, "refresh tensor", limit=LINE) for bias in moved]
    if names != sorted(set(names)):
        raise MalformedMessage("refresh: tensors must stand in the order of their names, each once; refuse it")
    return tuple((bias.name, bias.values) for bias in moved)


def _keys_request(keys: wire.KeysRequest) -> KeysRequest:
    nonce, adapter = _digest(keys.nonce), _digest(keys.adapter)
    return KeysRequest(
        keys.round, keys.sequence, nonce, adapter, tuple(_name(site) for site in _checked_length(keys.invited))
    )


def _write_keys_request(message: KeysRequest) -> wire.KeysRequest:
    return wire.KeysRequest(**_fields(message))


def _masked_reply(reply: wire.MaskedReply, tail: memoryview) -> MaskedReply:
    return MaskedReply(_batch([reply.commitment])[0], _vector(tail, "<u4"), _optional_head(reply))


def _write_masked_reply(message: MaskedReply) -> wire.MaskedReply:
    return wire.MaskedReply(commitment=_signed(message.commitment), ledger=_write_head(message.ledger))


def _update_request(request: wire.UpdateRequest) -> UpdateRequest:
    if len(request.sealing) != PUBLIC_BYTES[HYBRID]:
        raise MalformedMessage(f"sealing_bytes={len(request.sealing)}: the key has {PUBLIC_BYTES[HYBRID]}; refuse it")
    return UpdateRequest(_keys_request(request.opening), request.sealing)


def _update_reply(reply: wire.UpdateReply, tail: memoryview) -> UpdateReply:
    return UpdateReply(_batch([reply.commitment])[0], bytes(tail), _optional_head(reply))


def _write_update_reply(message: UpdateReply) -> wire.UpdateReply:
    return wire.UpdateReply(commitment=_signed(message.commitment), ledger=_write_head(message.ledger))


def _write_offer(message: Offer) -> wire.Offer:
    owners = [wire.OwnerSignature(site=site, signature=signature) for site, signature in message.owners]
    ledgers = [_write_head(head) for head in message.ledgers]
    return wire.Offer(**(_fields(message) | {"owners": owners, "ledgers": ledgers}))


def _offer_reply(reply: wire.OfferReply) -> OfferReply:
    state, detail = _shown(reply.state, reply.detail, "offer reply")
    return OfferReply(state, detail, reply.fetched, reply.owner_signature, _optional_head(reply))


def _write_offer_reply(message: OfferReply) -> wire.OfferReply:
    shown = {"state": one_line(message.state, NAME), "detail": one_line(message.detail)}
    return wire.OfferReply(**(_fields(message) | shown | {"ledger": _write_head(message.ledger)}))


def _head(head: wire.Countersigned) -> LedgerHead:
    for digest in (head.ledger, head.head):
        canonical.hexadecimal(digest, "ledger head", size=DIGEST_BYTES)
    return LedgerHead(head.ledger, head.count, head.head, head.signature)


def _optional_head(reply: wire.OfferReply | wire.MaskedReply | wire.UpdateReply) -> LedgerHead | None:
    return _head(reply.ledger) if reply.HasField("ledger") else None


def _write_head(head: LedgerHead | None) -> wire.Countersigned | None:
    return None if head is None else wire.Countersigned(**_fields(head))


def _offer(offer: wire.Offer) -> Offer:
    return Offer(
        manifest=offer.manifest,
        manifest_signature=offer.manifest_signature,
        owners=tuple((_name(owner.site), owner.signature) for owner in _checked_length(offer.owners)),
        package=_digest(offer.package),
        package_bytes=offer.package_bytes,
        sealed_key=offer.sealed_key,
        ledgers=tuple(_head(head) for head in _checked_length(offer.ledgers)),
    )


def _fields(message: Any) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}


def _check_version(version: int) -> None:
    if version != VERSION:
        raise MalformedMessage(f"version={version}: this side speaks {VERSION}; install the same release")


def _batch(messages: Sequence[wire.Signed]) -> tuple[Signed, ...]:
    return tuple(Signed(_name(m.sender), m.body, m.signature) for m in _checked_length(messages))


def _signed(message: Signed) -> wire.Signed:
    return wire.Signed(sender=message.sender, body=message.body, signature=message.signature)


def _checked_length(entries: Sequence[T]) -> Sequence[T]:
    if len(entries) > MAX_ENTRIES:
        raise MalformedMessage(
            f"entries={len(entries)}: a list has at most {MAX_ENTRIES}, one for each site; refuse it"
        )
    return entries


def _name(name: str) -> str:
    """Returns a site's name; the roster is checked where the name is looked up, and a simulation's names may be any."""
    if len(name) > NAME:
        raise MalformedMessage(f"name_characters={len(name)}: a site's name has at most {NAME}; refuse it")
    return name


def _shown(name: str, text: str, what: str) -> tuple[str, str]:
    return canonical.text(name, what, limit=NAME), canonical.text(text, what, limit=LINE)


def _write_shown(kind: type[K], message: Refusal | Notice) -> K:
    return kind(kind=one_line(message.kind, NAME), reason=one_line(message.reason))


def _vector(data: memoryview, dtype: str) -> np.ndarray:
    if len(data) % 4:
        raise MalformedMessage(f"vector_bytes={len(data)}: not a whole number of 32-bit entries; was it cut off")
    return np.frombuffer(data, dtype=dtype)


def _digest(data: bytes) -> bytes:
    if len(data) != DIGEST_BYTES:
        raise MalformedMessage(f"digest_bytes={len(data)}: a SHA-256 has {DIGEST_BYTES}; was it cut off")
    return data


_WRITERS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    TrainRequest: ("train_request", _write_train_request),
    TrainReply: ("train_reply", lambda m: wire.TrainReply(round=m.round)),
    KeysRequest: ("keys_request", _write_keys_request),
    SignedBatch: ("signed_batch", lambda m: wire.SignedBatch(messages=[_signed(signed) for signed in m.messages])),
    MaskedReply: ("masked_reply", _write_masked_reply),
    UpdateRequest: (
        "update_request",
        lambda m: wire.UpdateRequest(opening=_write_keys_request(m.opening), sealing=m.sealing),
    ),
    UpdateReply: ("update_reply", _write_update_reply),
    Announcement: ("announcement", lambda m: wire.Announcement(body=m.body)),
    Refusal: ("refusal", lambda m: _write_shown(wire.Refusal, m)),
    Offer: ("offer", _write_offer),
    OfferReply: ("offer_reply", _write_offer_reply),
    Notice: ("notice", lambda m: _write_shown(wire.Notice, m)),
}

# What follows the head: a vector of 4-byte numbers, or a box, without a copy.
_TAILS: dict[type, Callable[[Any], Any]] = {
    TrainRequest: lambda m: np.ascontiguousarray(m.adapter, dtype="<f4"),
    MaskedReply: lambda m: np.ascontiguousarray(m.vector, dtype="<u4"),
    UpdateReply: lambda m: m.box,
}

_LONG_READERS: dict[str | None, Callable[[Any, memoryview], Message]] = {
    "train_request": _train_request,
    "masked_reply": _masked_reply,
    "update_reply": _update_reply,
}

_READERS: dict[str | None, Callable[[Any], Message]] = {
    "train_reply": lambda m: TrainReply(m.round),
    "keys_request": _keys_request,
    "signed_batch": lambda m: SignedBatch(_batch(m.messages)),
    "update_request": _update_request,
    "announcement": lambda m: Announcement(m.body),
    "refusal": lambda m: Refusal(*_shown(m.kind, m.reason, "refusal")),
    "offer": _offer,
    "offer_reply": _offer_reply,
    "notice": lambda m: Notice(*_shown(m.kind, m.reason, "notice")),
}
