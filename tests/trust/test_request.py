"""Requests: every altered byte is refused, and a handover is signed by the identity that hands over."""

import dataclasses

import pytest

from offsite.errors import ConfigError, MalformedMessage, OffsiteError, Untrusted
from offsite.trust import canonical, certificates
from offsite.trust.identity import Identity
from offsite.trust.keys import SiteKeys
from offsite.trust.request import SiteRequest, _handed, _signed, write_request
from offsite.trust.wire import Writer


def flips(data, masks=(0x01, 0x20, 0x80)):
    for place in range(len(data)):
        for mask in masks:
            altered = bytearray(data)
            altered[place] ^= mask
            yield bytes(altered)


def resigned(request, identity, **changed):
    """Returns a request with changed content that its identity did sign."""
    changed = dataclasses.replace(request, **changed)
    return dataclasses.replace(changed, signature=identity.sign(_signed(changed)).hex()).to_bytes()


def test_round_trip(world):
    for request in world.requests.values():
        assert SiteRequest.from_bytes(request.to_bytes()) == request
        assert request.to_bytes() == SiteRequest.from_bytes(request.to_bytes()).to_bytes()


def test_every_flipped_byte_and_every_cut_is_refused(world):
    data = world.requests["north"].to_bytes()
    for altered in flips(data):
        with pytest.raises(OffsiteError):
            SiteRequest.from_bytes(altered)
    for size in range(0, len(data), 7):
        with pytest.raises(MalformedMessage):
            SiteRequest.from_bytes(data[:size])
    with pytest.raises(MalformedMessage):
        SiteRequest.from_bytes(data + b" ")


def test_every_flipped_byte_of_a_handover_is_refused(small):
    old, new = small.keys["north"], small.keys["west"]
    data = write_request(new, "north", now=small.now, previous=old.identity).to_bytes()
    assert SiteRequest.from_bytes(data).replaces == old.identity.public.hex()
    for altered in flips(data, masks=(0x01,)):
        with pytest.raises(OffsiteError):
            SiteRequest.from_bytes(altered)


def test_the_fingerprint_is_of_name_contact_and_keys(small, tmp_path):
    request = small.requests["north"]
    contact = {"contact": request.contact}
    again = write_request(small.keys["north"], "north", now=small.now.replace(year=2027), **contact)
    assert again.fingerprint == request.fingerprint
    assert again != request
    others = [
        write_request(small.keys["north"], "north2", now=small.now, **contact),
        write_request(small.keys["north"], "north", now=small.now, contact="another desk"),
        write_request(SiteKeys.create(tmp_path / "keys", 1), "north", now=small.now, **contact),
        *(one for site, one in small.requests.items() if site != "north"),
    ]
    assert request.fingerprint not in {one.fingerprint for one in others}


def test_what_the_owner_signed_itself_is_checked_too(small):
    """A site's own signature does not make a field valid."""
    request, other = small.requests["north"], small.requests["west"]
    identity = small.keys["north"].identity
    own = certificates.make_request(small.keys["north"].tls.read_bytes(), "other").decode()
    bad = [
        ({"name": "../north"}, ConfigError),
        ({"name": "coordinator"}, ConfigError),
        ({"name": ""}, ConfigError),
        ({"name": "west"}, Untrusted),
        ({"suite": 2}, Untrusted),
        ({"suite": 3}, MalformedMessage),
        ({"suite": True}, MalformedMessage),
        ({"sealing": "00" * 31}, Untrusted),
        ({"sealing": request.sealing.upper() + "A"}, MalformedMessage),
        ({"node": "ssh-ed25519 AAAA"}, Untrusted),
        ({"csr": own}, Untrusted),
        ({"csr": "ü"}, MalformedMessage),
        ({"csr": ""}, Untrusted),
        ({"created": "yesterday"}, MalformedMessage),
        ({"created": "2026-1-2T03:04:05Z"}, MalformedMessage),
        ({"replaces": other.identity}, Untrusted),
        ({"replaces": other.identity, "handover": "00" * 64}, Untrusted),
    ]
    for changed, error in bad:
        with pytest.raises(error):
            SiteRequest.from_bytes(resigned(request, identity, **changed))
    assert SiteRequest.from_bytes(resigned(request, identity)) == request


def test_a_stranger_cannot_hand_over_or_sign(small):
    request, stranger = small.requests["north"], Identity.generate()
    with pytest.raises(Untrusted, match="not signed by its identity"):
        SiteRequest.from_bytes(resigned(request, stranger))
    claimed = dataclasses.replace(request, replaces=small.requests["west"].identity)
    forged = stranger.sign(_handed(claimed)).hex()
    with pytest.raises(Untrusted):
        SiteRequest.from_bytes(
            resigned(request, small.keys["north"].identity, replaces=claimed.replaces, handover=forged)
        )


def test_a_handover_is_for_these_keys_only(small):
    """A thief cannot use another site's handover for keys of its own."""
    old = small.keys["north"].identity
    honest = write_request(small.keys["west"], "north", now=small.now, previous=old)
    theft = write_request(small.keys["east"], "north", now=small.now)
    with pytest.raises(Untrusted):
        SiteRequest.from_bytes(
            resigned(theft, small.keys["east"].identity, replaces=honest.replaces, handover=honest.handover)
        )


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"a":1}', b"1" * 5000, b'{"format":NaN}', b" " * (1 << 17)],
    ids=lambda data: data[:10],
)
def test_junk_is_refused(data):
    with pytest.raises(MalformedMessage):
        SiteRequest.from_bytes(data)


def test_other_fields_and_encodings_are_refused(small):
    data = small.requests["north"].to_bytes()
    content = canonical.load(data, "request", ["format", *(f.name for f in dataclasses.fields(SiteRequest))])
    for other in (content | {"extra": 1}, content | {"format": 2}, {k: v for k, v in content.items() if k != "node"}):
        with pytest.raises(MalformedMessage):
            SiteRequest.from_bytes(canonical.dump(other))
    for same in (
        data.replace(b":", b": ", 1),
        b" " + data,
        data[:-1] + b',"suite":1}',
        data.replace(b'"n', b'"\\u006e', 1),
    ):
        with pytest.raises(MalformedMessage):
            SiteRequest.from_bytes(same)


def test_the_signature_is_for_this_purpose_and_leaves_nothing_out(world):
    made = world.requests["north"]
    unsigned = dataclasses.replace(made, signature="").to_bytes()
    signed = Writer().text("offsite request").field(unsigned).done()
    assert made.signature == world.keys["north"].identity.sign(signed).hex()
