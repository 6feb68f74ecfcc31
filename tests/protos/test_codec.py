"""Messages survive the wire, and no other bytes decode."""

import re
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offsite.errors import MalformedMessage
from offsite.protos import codec, framing
from offsite.protos.messages import LINE as LINE_CHARACTERS
from offsite.protos.messages import MAX_BIASES, MAX_REFRESH_BYTES, one_line
from offsite.trust.federation_manifest import MAX_SITES

DIGEST = st.binary(min_size=32, max_size=32)
NAME = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)
LINE = st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
HEX = DIGEST.map(bytes.hex)
COUNT = st.integers(0, 2**32 - 1)
SIGNED = st.builds(codec.Signed, NAME, st.binary(max_size=40), st.binary(max_size=64))
FLOATS = st.lists(st.floats(width=32, allow_nan=False), max_size=8).map(lambda v: np.array(v, dtype=np.float32))
HEADS = st.builds(codec.LedgerHead, HEX, st.integers(0, 2**64 - 1), HEX, st.binary(max_size=64))
MAYBE_HEAD = st.none() | HEADS
OWNERS = st.lists(st.tuples(NAME, st.binary(max_size=64)), max_size=3).map(tuple)
LONG = st.integers(0, 2**64 - 1)
WORDS = st.lists(st.integers(0, 2**32 - 1), max_size=8).map(lambda v: np.array(v, dtype=np.uint32))
MOVED = st.dictionaries(LINE, st.binary(max_size=8), max_size=3).map(lambda moved: tuple(sorted(moved.items())))
KEYS = st.builds(codec.KeysRequest, COUNT, st.integers(0, 2**64 - 1), DIGEST, DIGEST, st.lists(NAME).map(tuple))
MESSAGES = st.one_of(
    st.builds(codec.TrainRequest, DIGEST, COUNT, FLOATS, MOVED),
    st.builds(codec.TrainReply, COUNT),
    KEYS,
    st.builds(codec.SignedBatch, st.lists(SIGNED, max_size=3).map(tuple)),
    st.builds(codec.MaskedReply, SIGNED, WORDS, MAYBE_HEAD),
    st.builds(codec.UpdateRequest, KEYS, st.binary(min_size=1216, max_size=1216)),
    st.builds(codec.UpdateReply, SIGNED, st.binary(max_size=40), MAYBE_HEAD),
    st.builds(codec.Announcement, st.binary(max_size=40)),
    st.builds(codec.Refusal, LINE, LINE),
    st.builds(
        codec.Offer,
        st.binary(max_size=40),
        st.binary(max_size=64),
        OWNERS,
        DIGEST,
        LONG,
        st.binary(max_size=80),
        st.lists(HEADS, max_size=2).map(tuple),
    ),
    st.builds(codec.OfferReply, LINE, LINE, LONG, st.binary(max_size=64), MAYBE_HEAD),
    st.builds(codec.Notice, LINE, LINE),
)
SIGNED_MESSAGES = st.builds(
    codec.SignedMessage, DIGEST, LINE, LINE, LINE, LONG, st.binary(max_size=40), st.binary(max_size=64)
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


@given(SIGNED_MESSAGES)
def test_a_signed_message_comes_back(message: codec.SignedMessage) -> None:
    assert codec.decode_signed_message(codec.encode_signed_message(message)) == message


HEAD = codec.LedgerHead("0a" * 32, 7, "0b" * 32, bytes(range(64)))
OFFER = codec.Offer(b"{}", bytes(64), (("ash", b"a"), ("birch", b"b")), bytes(range(32)), 1 << 40, b"box", (HEAD, HEAD))
EXAMPLES = [
    codec.TrainRequest(bytes(range(32)), 3, np.array([1.0, -2.5], dtype=np.float32)),
    codec.TrainRequest(bytes(32), 2, np.array([1.0], dtype=np.float32), (("a.bias", b"\0\1"), ("b.bias", b"\2\3"))),
    codec.TrainReply(3),
    codec.KeysRequest(3, 9, bytes(32), bytes(range(32)), ("ash", "birch")),
    codec.SignedBatch((codec.Signed("ash", b"body", b"sig"),)),
    codec.MaskedReply(codec.Signed("ash", b"body", b"sig"), np.array([1, 2**32 - 1], dtype=np.uint32)),
    codec.Announcement(b"list"),
    codec.Refusal("RangeError", "why"),
    codec.MaskedReply(codec.Signed("ash", b"body", b"sig"), np.array([5], dtype=np.uint32), HEAD),
    codec.UpdateReply(codec.Signed("ash", b"body", b"sig"), b"box"),
    codec.UpdateReply(codec.Signed("ash", b"body", b"sig"), b"box", HEAD),
    codec.UpdateRequest(codec.KeysRequest(3, 9, bytes(32), bytes(32), ("ash",)), bytes(range(64)) * 19),
    OFFER,
    codec.OfferReply("ready", "why", 1 << 33, bytes(64), HEAD),
    codec.OfferReply("waiting", "", 0, b"", None),
    codec.Notice("abort", "why"),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_every_truncation_is_refused(message: codec.Message) -> None:
    data = codec.encode(message)
    for length in range(len(data)):
        with pytest.raises(MalformedMessage):
            codec.decode(data[:length])


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_flipped_bit_is_refused_or_another_message(message: codec.Message) -> None:
    """The codec keeps no checksum; a flip may make another message, but never the same message or a crash."""
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
def test_noise_is_no_signed_message(data: bytes) -> None:
    try:
        message = codec.decode_signed_message(data)
    except MalformedMessage:
        return
    assert codec.encode_signed_message(message) == data


def test_an_offer_of_a_package_without_a_whole_hash_is_refused() -> None:
    for short in (b"", bytes(31), bytes(33)):
        with pytest.raises(MalformedMessage, match=f"digest_bytes={len(short)}"):
            codec.decode(codec.encode(replace(OFFER, package=short)))


LONG_TEXTS = ["x" * (LINE_CHARACTERS + 1), "x" * (1 << 20), "a\nb", "\x1b[2J", "ümlaut", "\0", "\x7f", "\udcff"]
SHOWN = {
    "Refusal.kind": lambda text: codec.Refusal(text, "why"),
    "Refusal.reason": lambda text: codec.Refusal("RangeError", text),
    "Notice.kind": lambda text: codec.Notice(text, "why"),
    "Notice.reason": lambda text: codec.Notice("abort", text),
    "OfferReply.state": lambda text: codec.OfferReply(text, "why", 0, b""),
    "OfferReply.detail": lambda text: codec.OfferReply("ready", text, 0, b""),
}


@pytest.mark.parametrize("where", SHOWN)
@pytest.mark.parametrize("text", LONG_TEXTS, ids=lambda text: ascii(text[:9]))
def test_a_line_that_nobody_could_read_is_cut_by_its_writer(where: str, text: str) -> None:
    kind, field = where.split(".")
    message = codec.decode(codec.encode(SHOWN[where](text)))
    shown = getattr(message, field)
    assert type(message).__name__ == kind
    assert re.fullmatch("[ -~]{1,1024}", shown)
    assert codec.decode(codec.encode(message)) == message
    assert [left == right for left, right in zip(shown, text, strict=False)].count(False) <= 3


@pytest.mark.parametrize("where", SHOWN)
@pytest.mark.parametrize("text", [text for text in LONG_TEXTS if text.isprintable() or ord(text[0]) < 128])
def test_a_line_that_nobody_could_read_is_refused_by_its_reader(
    where: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer writes without limits: the same message without the cut."""
    monkeypatch.setattr(codec, "one_line", lambda text, most=0: text)
    data = codec.encode(SHOWN[where](text))
    with pytest.raises(MalformedMessage, match="must be a printable ASCII text"):
        codec.decode(data)


def test_a_line_up_to_the_limit_is_left_as_it_is() -> None:
    for size in (0, 1, LINE_CHARACTERS - 1, LINE_CHARACTERS):
        assert codec.decode(codec.encode(codec.Refusal("A", "x" * size))) == codec.Refusal("A", "x" * size)
    assert one_line("x" * 10, 8) == "xxxxx..."


@pytest.mark.parametrize("wrong", ["", "0a" * 31, "0a" * 33, "0A" * 32, "xy" * 32, "ä" * 64])
@pytest.mark.parametrize("field", ["ledger", "head"])
def test_a_ledger_head_is_two_digests(field: str, wrong: str) -> None:
    head = replace(HEAD, **{field: wrong})
    masked = codec.MaskedReply(codec.Signed("ash", b"", b""), np.array([5], dtype=np.uint32), head)
    for message in (codec.OfferReply("ready", "", 0, b"", head), masked, replace(OFFER, ledgers=(HEAD, head))):
        with pytest.raises(MalformedMessage, match="ledger head: must be lower-case hexadecimal of 32 bytes"):
            codec.decode(codec.encode(message))


LISTS = {
    "messages": lambda count: codec.SignedBatch((codec.Signed("ash", b"body", b"sig"),) * count),
    "invited": lambda count: codec.KeysRequest(3, 9, bytes(32), bytes(32), ("ash",) * count),
    "owners": lambda count: replace(OFFER, owners=(("ash", b"a"),) * count),
    "ledgers": lambda count: replace(OFFER, ledgers=(HEAD,) * count),
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_has_one_entry_for_each_site_at_most(kind: str) -> None:
    assert same(codec.decode(codec.encode(LISTS[kind](MAX_SITES))), LISTS[kind](MAX_SITES))
    with pytest.raises(MalformedMessage, match=f"entries={MAX_SITES + 1}"):
        codec.decode(codec.encode(LISTS[kind](MAX_SITES + 1)))


MOVES = {
    "order": (("b", b"12"), ("a", b"12")),
    "twice": (("a", b"12"), ("a", b"12")),
    "screen": (("a\x1b[2J", b"12"),),
    "long name": (("a" * (LINE_CHARACTERS + 1), b"12"),),
    "many": tuple((f"{i:05}", b"12") for i in range(MAX_BIASES + 1)),
    "large": (("a", bytes(MAX_REFRESH_BYTES // 2)), ("b", bytes(MAX_REFRESH_BYTES // 2 + 1))),
}


@pytest.mark.parametrize("kind", MOVES)
def test_moved_biases_are_few_small_and_in_order(kind: str) -> None:
    with pytest.raises(MalformedMessage, match="refresh"):
        codec.decode(codec.encode(codec.TrainRequest(bytes(32), 2, np.zeros(1, np.float32), MOVES[kind])))


NAMED = {
    "sender": lambda name: codec.SignedBatch((codec.Signed(name, b"body", b"sig"),)),
    "invited": lambda name: codec.KeysRequest(3, 9, bytes(32), bytes(32), (name,)),
    "owner": lambda name: replace(OFFER, owners=((name, b"a"),)),
}


@pytest.mark.parametrize("kind", NAMED)
def test_a_name_without_end_is_refused(kind: str) -> None:
    assert codec.decode(codec.encode(NAMED[kind]("ü" * 128))) == NAMED[kind]("ü" * 128)
    with pytest.raises(MalformedMessage, match="name_characters=129"):
        codec.decode(codec.encode(NAMED[kind]("x" * 129)))


def test_a_ledger_head_that_is_not_there_is_none_and_not_an_empty_one() -> None:
    empty = codec.LedgerHead("00" * 32, 0, "00" * 32)
    for head in (None, empty):
        message = codec.decode(codec.encode(codec.OfferReply("ready", "", 0, b"", head)))
        assert isinstance(message, codec.OfferReply)
        assert message.ledger == head


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
    data[5] = 1
    with pytest.raises(MalformedMessage, match="version=1"):
        codec.decode(bytes(data))


def test_unknown_fields_are_refused() -> None:
    head = codec.encode(codec.TrainReply(1))[4:] + b"\xf8\x07\x01"
    with pytest.raises(MalformedMessage, match="canonical form"):
        codec.decode(len(head).to_bytes(4, "big") + head)


def test_a_head_is_bounded_and_a_vector_only_by_its_carrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a message may have in all follows from the job, and the carrier counts it: `protos.flower_pieces`."""
    request = codec.TrainRequest(bytes(32), 1, np.arange(1000, dtype=np.float32))
    monkeypatch.setattr(framing, "MAX_HEAD_BYTES", 100)
    assert same(codec.decode(codec.encode(request)), request)
    with pytest.raises(MalformedMessage, match="head_bytes=101: above the limit 100"):
        codec.decode((101).to_bytes(4, "big") + bytes(101))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_bytes_behind_a_message_are_refused(message: codec.Message) -> None:
    for more in (b"\0", bytes(4), bytes(8)):
        with pytest.raises(MalformedMessage, match="tail_bytes"):
            codec.decode(codec.encode(message) + more)


def test_a_vector_is_read_where_it_lies() -> None:
    """A vector may be most of the machine's memory: reading makes no copy, and writing one."""
    data = codec.encode(codec.TrainRequest(bytes(32), 1, np.arange(1 << 16, dtype=np.float32)))
    read = codec.decode(data)
    assert isinstance(read, codec.TrainRequest)
    assert np.shares_memory(read.adapter, np.frombuffer(data, dtype=np.uint8))
    assert len(data) < 4 * (1 << 16) + 100


@pytest.mark.parametrize("size", [0, 32, 1215, 1217])
def test_a_key_to_seal_to_has_one_length(size: int) -> None:
    opening = codec.KeysRequest(3, 9, bytes(32), bytes(32), ("ash",))
    with pytest.raises(MalformedMessage, match=f"sealing_bytes={size}: the key has 1216"):
        codec.decode(codec.encode(codec.UpdateRequest(opening, bytes(size))))
