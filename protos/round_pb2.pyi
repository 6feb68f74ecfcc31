from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Envelope(_message.Message):
    __slots__ = ("version", "train_request", "train_reply", "signed_batch", "masked_reply", "announcement", "refusal", "keys_request")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TRAIN_REQUEST_FIELD_NUMBER: _ClassVar[int]
    TRAIN_REPLY_FIELD_NUMBER: _ClassVar[int]
    SIGNED_BATCH_FIELD_NUMBER: _ClassVar[int]
    MASKED_REPLY_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCEMENT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    KEYS_REQUEST_FIELD_NUMBER: _ClassVar[int]
    version: int
    train_request: TrainRequest
    train_reply: TrainReply
    signed_batch: SignedBatch
    masked_reply: MaskedReply
    announcement: Announcement
    refusal: Refusal
    keys_request: KeysRequest
    def __init__(self, version: _Optional[int] = ..., train_request: _Optional[_Union[TrainRequest, _Mapping]] = ..., train_reply: _Optional[_Union[TrainReply, _Mapping]] = ..., signed_batch: _Optional[_Union[SignedBatch, _Mapping]] = ..., masked_reply: _Optional[_Union[MaskedReply, _Mapping]] = ..., announcement: _Optional[_Union[Announcement, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., keys_request: _Optional[_Union[KeysRequest, _Mapping]] = ...) -> None: ...

class TrainRequest(_message.Message):
    __slots__ = ("job", "round", "adapter")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    job: bytes
    round: int
    adapter: bytes
    def __init__(self, job: _Optional[bytes] = ..., round: _Optional[int] = ..., adapter: _Optional[bytes] = ...) -> None: ...

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
    __slots__ = ("commitment", "vector")
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    commitment: Signed
    vector: bytes
    def __init__(self, commitment: _Optional[_Union[Signed, _Mapping]] = ..., vector: _Optional[bytes] = ...) -> None: ...

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
