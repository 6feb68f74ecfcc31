"""Signed messages: every changed or missing byte, other sender, recipient, key, federation or stage is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offsite.errors import MalformedMessage, OffsiteError, ProtocolViolation
from offsite.protos import codec, framing, signed_messages
from offsite.trust.identity import Identity

IDENTITY, STRANGER = Identity.from_bytes(bytes(32)), Identity.from_bytes(bytes([1]) * 32)
FEDERATION = bytes(range(32))
TERMS = {"sender": "ash", "recipient": signed_messages.COORDINATOR, "stage": "keys", "number": 7, "body": b"body"}
MESSAGE = signed_messages.write(IDENTITY, FEDERATION, **TERMS)

NAME = st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=128)


def read(data: bytes, **changed: object) -> codec.SignedMessage:
    expected: dict[str, object] = {"sender": "ash", "key": IDENTITY.public, "recipient": signed_messages.COORDINATOR}
    return signed_messages.read(data, **({"federation": FEDERATION} | expected | changed))


@settings(max_examples=60)
@given(NAME, NAME, NAME, st.integers(0, 2**64 - 1), st.binary(max_size=99))
def test_a_message_says_what_was_written(sender: str, recipient: str, stage: str, number: int, body: bytes) -> None:
    data = signed_messages.write(
        IDENTITY, FEDERATION, sender=sender, recipient=recipient, stage=stage, number=number, body=body
    )
    message = read(data, sender=sender, recipient=recipient)
    found = (message.sender, message.recipient, message.stage, message.number, message.body)
    assert found == (sender, recipient, stage, number, body)


@pytest.mark.parametrize(
    "name", ["x" * 129, "x" * (1 << 20), "a\nb", "\x1b[2J", "ümlaut", "\0"], ids=lambda n: ascii(n[:9])
)
@pytest.mark.parametrize("field", ["sender", "recipient", "stage"])
def test_a_name_that_cannot_stand_in_a_log_is_refused_whoever_signed_it(field: str, name: str) -> None:
    data = signed_messages.write(IDENTITY, FEDERATION, **(TERMS | {field: name}))
    with pytest.raises(MalformedMessage, match="letter name: must be a printable ASCII text of at most 128") as caught:
        read(data, sender=name if field == "sender" else "ash")
    assert name not in str(caught.value)


def test_every_flipped_bit_is_refused() -> None:
    assert read(MESSAGE).body == b"body"
    for place in range(8 * len(MESSAGE)):
        altered = bytearray(MESSAGE)
        altered[place // 8] ^= 1 << place % 8
        with pytest.raises(OffsiteError):
            read(bytes(altered))


def test_every_truncation_and_every_byte_more_is_refused() -> None:
    for length in range(len(MESSAGE)):
        with pytest.raises(OffsiteError):
            read(MESSAGE[:length])
    for byte in range(256):
        for longer in (MESSAGE + bytes([byte]), bytes([byte]) + MESSAGE):
            with pytest.raises(MalformedMessage):
                read(longer)


def test_two_messages_in_one_are_refused() -> None:
    """Protobuf merges concatenated messages, so that the last signature would stand under fields of both."""
    other = signed_messages.write(IDENTITY, FEDERATION, **(TERMS | {"number": 8}))
    for pair in (MESSAGE + MESSAGE, MESSAGE + other, other + MESSAGE):
        with pytest.raises(MalformedMessage):
            read(pair)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"sender": "birch"}, "sender='ash': 'birch' was expected"),
        ({"sender": signed_messages.COORDINATOR}, "sender='ash'"),
        ({"recipient": "birch"}, "recipient='coordinator': 'birch'"),
        ({"federation": bytes(32)}, "000000000000 holds here"),
        ({"federation": FEDERATION[:31] + b"x"}, "000102030405 holds here"),
        ({"key": STRANGER.public}, "did not sign"),
        ({"key": b"no key"}, "did not sign"),
    ],
)
def test_a_message_read_where_it_does_not_belong(changed: dict[str, object], match: str) -> None:
    with pytest.raises(ProtocolViolation, match=match):
        read(MESSAGE, **changed)


@pytest.mark.parametrize(
    "changed",
    [{"stage": "masked"}, {"number": 8}, {"number": 0}, {"body": b"bodY"}, {"body": b""}, {"sender": "elm"}],
    ids=str,
)
def test_the_signature_covers_stage_number_and_body(changed: dict[str, object]) -> None:
    """Fields of one message under the signature of another, which a man in the middle can write."""
    signature = codec.decode_signed_message(MESSAGE).signature
    fields = TERMS | changed
    forged = codec.SignedMessage(
        FEDERATION, *(fields[name] for name in ("sender", "recipient", "stage", "number", "body")), signature
    )
    with pytest.raises(ProtocolViolation, match="did not sign"):
        read(codec.encode_signed_message(forged), sender=fields["sender"])


def test_a_message_is_no_answer_to_its_own_writer() -> None:
    """A message that is sent back to its writer does not pass as an answer of the other side."""
    down = signed_messages.write(
        IDENTITY, FEDERATION, **(TERMS | {"sender": signed_messages.COORDINATOR, "recipient": "ash"})
    )
    with pytest.raises(ProtocolViolation, match="sender"):
        read(down)
    with pytest.raises(ProtocolViolation, match="recipient"):
        read(down, sender=signed_messages.COORDINATOR)


def test_where_one_field_ends_and_the_next_begins_is_signed() -> None:
    """`ab` + `c` and `a` + `bc` are different messages with different signatures."""
    one = signed_messages.write(IDENTITY, FEDERATION, **(TERMS | {"sender": "ab", "recipient": "c"}))
    two = signed_messages.write(IDENTITY, FEDERATION, **(TERMS | {"sender": "a", "recipient": "bc"}))
    moved = codec.decode_signed_message(one)
    assert moved.signature != codec.decode_signed_message(two).signature
    forged = codec.SignedMessage(FEDERATION, "a", "bc", moved.stage, moved.number, moved.body, moved.signature)
    with pytest.raises(ProtocolViolation, match="did not sign"):
        read(codec.encode_signed_message(forged), sender="a", recipient="bc")


def test_a_signature_over_something_else_of_the_same_bytes_is_refused() -> None:
    """An identity also signs manifests and aggregation messages; the label keeps these signatures apart."""
    message = codec.decode_signed_message(MESSAGE)
    for signature in (IDENTITY.sign(message.body), IDENTITY.sign(MESSAGE), IDENTITY.sign(FEDERATION), b"", bytes(64)):
        forged = codec.SignedMessage(
            FEDERATION, message.sender, message.recipient, message.stage, message.number, message.body, signature
        )
        with pytest.raises(ProtocolViolation, match="did not sign"):
            read(codec.encode_signed_message(forged))


def test_another_version_says_what_to_do() -> None:
    with pytest.raises(MalformedMessage, match="version=1: this side speaks 2"):
        read(MESSAGE[:4] + b"\x08\x01" + MESSAGE[6:])


def test_oversize_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "MAX_HEAD_BYTES", int.from_bytes(MESSAGE[:4], "big") - 1)
    with pytest.raises(MalformedMessage, match="above the limit"):
        read(MESSAGE)
