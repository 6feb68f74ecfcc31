from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Envelope(_message.Message):
    __slots__ = ("version", "train_request", "train_reply", "signed_batch", "masked_reply", "announcement", "refusal", "keys_request", "offer", "offer_reply", "notice", "update_reply", "update_request", "tail")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TRAIN_REQUEST_FIELD_NUMBER: _ClassVar[int]
    TRAIN_REPLY_FIELD_NUMBER: _ClassVar[int]
    SIGNED_BATCH_FIELD_NUMBER: _ClassVar[int]
    MASKED_REPLY_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCEMENT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    KEYS_REQUEST_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    OFFER_REPLY_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_REPLY_FIELD_NUMBER: _ClassVar[int]
    UPDATE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    version: int
    train_request: TrainRequest
    train_reply: TrainReply
    signed_batch: SignedBatch
    masked_reply: MaskedReply
    announcement: Announcement
    refusal: Refusal
    keys_request: KeysRequest
    offer: Offer
    offer_reply: OfferReply
    notice: Notice
    update_reply: UpdateReply
    update_request: UpdateRequest
    tail: int
    def __init__(self, version: _Optional[int] = ..., train_request: _Optional[_Union[TrainRequest, _Mapping]] = ..., train_reply: _Optional[_Union[TrainReply, _Mapping]] = ..., signed_batch: _Optional[_Union[SignedBatch, _Mapping]] = ..., masked_reply: _Optional[_Union[MaskedReply, _Mapping]] = ..., announcement: _Optional[_Union[Announcement, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., keys_request: _Optional[_Union[KeysRequest, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., offer_reply: _Optional[_Union[OfferReply, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ..., update_reply: _Optional[_Union[UpdateReply, _Mapping]] = ..., update_request: _Optional[_Union[UpdateRequest, _Mapping]] = ..., tail: _Optional[int] = ...) -> None: ...

class Letter(_message.Message):
    __slots__ = ("version", "federation", "sender", "recipient", "stage", "number", "signature", "tail")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    RECIPIENT_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    version: int
    federation: bytes
    sender: str
    recipient: str
    stage: str
    number: int
    signature: bytes
    tail: int
    def __init__(self, version: _Optional[int] = ..., federation: _Optional[bytes] = ..., sender: _Optional[str] = ..., recipient: _Optional[str] = ..., stage: _Optional[str] = ..., number: _Optional[int] = ..., signature: _Optional[bytes] = ..., tail: _Optional[int] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("manifest", "manifest_signature", "owners", "package", "package_bytes", "sealed_key", "ledgers")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    OWNERS_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEALED_KEY_FIELD_NUMBER: _ClassVar[int]
    LEDGERS_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    manifest_signature: bytes
    owners: _containers.RepeatedCompositeFieldContainer[OwnerSignature]
    package: bytes
    package_bytes: int
    sealed_key: bytes
    ledgers: _containers.RepeatedCompositeFieldContainer[Countersigned]
    def __init__(self, manifest: _Optional[bytes] = ..., manifest_signature: _Optional[bytes] = ..., owners: _Optional[_Iterable[_Union[OwnerSignature, _Mapping]]] = ..., package: _Optional[bytes] = ..., package_bytes: _Optional[int] = ..., sealed_key: _Optional[bytes] = ..., ledgers: _Optional[_Iterable[_Union[Countersigned, _Mapping]]] = ...) -> None: ...

class Countersigned(_message.Message):
    __slots__ = ("ledger", "count", "head", "signature")
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    ledger: str
    count: int
    head: str
    signature: bytes
    def __init__(self, ledger: _Optional[str] = ..., count: _Optional[int] = ..., head: _Optional[str] = ..., signature: _Optional[bytes] = ...) -> None: ...

class OwnerSignature(_message.Message):
    __slots__ = ("site", "signature")
    SITE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    site: str
    signature: bytes
    def __init__(self, site: _Optional[str] = ..., signature: _Optional[bytes] = ...) -> None: ...

class OfferReply(_message.Message):
    __slots__ = ("state", "detail", "fetched", "owner_signature", "ledger")
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    OWNER_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    state: str
    detail: str
    fetched: int
    owner_signature: bytes
    ledger: Countersigned
    def __init__(self, state: _Optional[str] = ..., detail: _Optional[str] = ..., fetched: _Optional[int] = ..., owner_signature: _Optional[bytes] = ..., ledger: _Optional[_Union[Countersigned, _Mapping]] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("kind", "reason")
    KIND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    kind: str
    reason: str
    def __init__(self, kind: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class TrainRequest(_message.Message):
    __slots__ = ("job", "round", "refresh")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    REFRESH_FIELD_NUMBER: _ClassVar[int]
    job: bytes
    round: int
    refresh: _containers.RepeatedCompositeFieldContainer[Bias]
    def __init__(self, job: _Optional[bytes] = ..., round: _Optional[int] = ..., refresh: _Optional[_Iterable[_Union[Bias, _Mapping]]] = ...) -> None: ...

class Bias(_message.Message):
    __slots__ = ("name", "values")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    name: str
    values: bytes
    def __init__(self, name: _Optional[str] = ..., values: _Optional[bytes] = ...) -> None: ...

class TrainReply(_message.Message):
    __slots__ = ("round",)
    ROUND_FIELD_NUMBER: _ClassVar[int]
    round: int
    def __init__(self, round: _Optional[int] = ...) -> None: ...

class KeysRequest(_message.Message):
    __slots__ = ("round", "sequence", "nonce", "adapter", "invited")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    INVITED_FIELD_NUMBER: _ClassVar[int]
    round: int
    sequence: int
    nonce: bytes
    adapter: bytes
    invited: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, round: _Optional[int] = ..., sequence: _Optional[int] = ..., nonce: _Optional[bytes] = ..., adapter: _Optional[bytes] = ..., invited: _Optional[_Iterable[str]] = ...) -> None: ...

class Signed(_message.Message):
    __slots__ = ("sender", "body", "signature")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    sender: str
    body: bytes
    signature: bytes
    def __init__(self, sender: _Optional[str] = ..., body: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class SignedBatch(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Signed]
    def __init__(self, messages: _Optional[_Iterable[_Union[Signed, _Mapping]]] = ...) -> None: ...

class MaskedReply(_message.Message):
    __slots__ = ("commitment", "ledger")
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    commitment: Signed
    ledger: Countersigned
    def __init__(self, commitment: _Optional[_Union[Signed, _Mapping]] = ..., ledger: _Optional[_Union[Countersigned, _Mapping]] = ...) -> None: ...

class UpdateRequest(_message.Message):
    __slots__ = ("opening", "sealing")
    OPENING_FIELD_NUMBER: _ClassVar[int]
    SEALING_FIELD_NUMBER: _ClassVar[int]
    opening: KeysRequest
    sealing: bytes
    def __init__(self, opening: _Optional[_Union[KeysRequest, _Mapping]] = ..., sealing: _Optional[bytes] = ...) -> None: ...

class UpdateReply(_message.Message):
    __slots__ = ("commitment", "ledger")
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    commitment: Signed
    ledger: Countersigned
    def __init__(self, commitment: _Optional[_Union[Signed, _Mapping]] = ..., ledger: _Optional[_Union[Countersigned, _Mapping]] = ...) -> None: ...

class Announcement(_message.Message):
    __slots__ = ("body",)
    BODY_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    def __init__(self, body: _Optional[bytes] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("kind", "reason")
    KIND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    kind: str
    reason: str
    def __init__(self, kind: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...
