"""Messages survive the wire, and nothing else does."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import MalformedMessage
from protos import codec

DIGEST = st.binary(min_size=32, max_size=32)
NAME = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)
COUNT = st.integers(0, 2**32 - 1)
SIGNED = st.builds(codec.SignedBytes, NAME, st.binary(max_size=40), st.binary(max_size=64))
FLOATS = st.lists(st.floats(width=32, allow_nan=False), max_size=8).map(lambda v: np.array(v, dtype=np.float32))
WORDS = st.lists(st.integers(0, 2**32 - 1), max_size=8).map(lambda v: np.array(v, dtype=np.uint32))
MESSAGES = st.one_of(
    st.builds(codec.TrainRequest, DIGEST, COUNT, FLOATS),
    st.builds(codec.TrainReply, COUNT),
    st.builds(codec.KeysRequest, COUNT, st.integers(0, 2**64 - 1), DIGEST, DIGEST, st.lists(NAME).map(tuple)),
    st.builds(codec.SignedBatch, st.lists(SIGNED, max_size=3).map(tuple)),
    st.builds(codec.MaskedReply, SIGNED, WORDS),
    st.builds(codec.Announcement, st.binary(max_size=40)),
    st.builds(codec.Refusal, NAME, NAME),
)


def same(left: object, right: object) -> bool:
    if isinstance(left, np.ndarray):
        return isinstance(right, np.ndarray) and left.dtype == right.dtype and left.tobytes() == right.tobytes()
    if hasattr(left, "__dataclass_fields__"):
        return type(left) is type(right) and all(
            same(getattr(left, f.name), getattr(right, f.name)) for f in fields(left)
        )
    return left == right


@given(MESSAGES)
def test_a_message_comes_back(message: codec.Message) -> None:
    assert same(codec.decode(codec.encode(message)), message)


EXAMPLES = [
    codec.TrainRequest(bytes(range(32)), 3, np.array([1.0, -2.5], dtype=np.float32)),
    codec.TrainReply(3),
    codec.KeysRequest(3, 9, bytes(32), bytes(range(32)), ("ash", "birch")),
    codec.SignedBatch((codec.SignedBytes("ash", b"body", b"sig"),)),
    codec.MaskedReply(codec.SignedBytes("ash", b"body", b"sig"), np.array([1, 2**32 - 1], dtype=np.uint32)),
    codec.Announcement(b"list"),
    codec.Refusal("RangeError", "why"),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_every_truncation_is_refused(message: codec.Message) -> None:
    data = codec.encode(message)
    for length in range(len(data)):
        with pytest.raises(MalformedMessage):
            codec.decode(data[:length])


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_flipped_bit_is_refused_or_another_message(message: codec.Message) -> None:
    """The codec keeps no checksum of its own; a flip may make another message, but never the same one or a crash."""
    data = codec.encode(message)
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        try:
            other = codec.decode(bytes(flipped))
        except MalformedMessage:
            continue
        assert not same(other, message)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    try:
        message = codec.decode(data)
    except MalformedMessage:
        return
    assert codec.encode(message) == data


def test_another_version_says_what_to_do() -> None:
    data = bytearray(codec.encode(codec.TrainReply(1)))
    data[1] = 2
    with pytest.raises(MalformedMessage, match="version=2"):
        codec.decode(bytes(data))


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(MalformedMessage):
        codec.decode(codec.encode(codec.TrainReply(1)) + b"\xf8\x07\x01")


def test_oversize_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_BYTES", 8)
    with pytest.raises(MalformedMessage, match="above the limit"):
        codec.decode(bytes(9))
