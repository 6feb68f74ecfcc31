"""Welcomes: every altered byte is refused, and the fingerprint covers authority, coordinator and manifest."""

import dataclasses

import pytest

from offsite.errors import ConfigError, MalformedMessage, OffsiteError, Untrusted
from offsite.trust import certificates
from offsite.trust.identity import Identity
from offsite.trust.welcome import Welcome, write_welcome
from offsite.trust.wire import Writer


def test_round_trip(world):
    read = Welcome.from_bytes(world.welcome.to_bytes())
    assert read == world.welcome
    assert read.manifest == world.federation


def test_every_flipped_byte_and_every_cut_is_refused(world):
    data = world.welcome.to_bytes()
    masks = (0x01, 0x20) if world.federation.suite == 1 else (0x01,)
    for place in range(len(data)):
        for mask in masks:
            altered = bytearray(data)
            altered[place] ^= mask
            with pytest.raises(OffsiteError):
                Welcome.from_bytes(bytes(altered))
    for size in range(0, len(data), 11):
        with pytest.raises(MalformedMessage):
            Welcome.from_bytes(data[:size])


def test_only_the_coordinator_of_the_manifest_can_sign(small):
    forged = write_welcome(small.welcome, Identity.generate())
    with pytest.raises(Untrusted, match="not signed by the coordinator"):
        Welcome.from_bytes(forged.to_bytes())
    with pytest.raises(MalformedMessage):
        Welcome.from_bytes(dataclasses.replace(small.welcome, signature="").to_bytes())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"site": "../x"}, ConfigError),
        ({"host": "x" * 256}, MalformedMessage),
        ({"host": "hö"}, MalformedMessage),
        ({"host": "x\x1b[2J"}, MalformedMessage),
        ({"link_port": 0}, MalformedMessage),
        ({"depot_port": 65536}, MalformedMessage),
        ({"depot_port": True}, MalformedMessage),
        ({"ca": "ü".encode()}, MalformedMessage),
        ({"federation": b"{}"}, MalformedMessage),
        ({"earlier": ("ü".encode(),)}, MalformedMessage),
    ],
    ids=str,
)
def test_what_the_coordinator_signed_itself_is_checked_too(small, change, error):
    with pytest.raises(error):
        Welcome.from_bytes(write_welcome(dataclasses.replace(small.welcome, **change), small.coordinator).to_bytes())


def test_the_fingerprint_covers_what_a_thief_would_change(small):
    """An impostor who replaces everything, or one part, cannot show the same fingerprint."""
    honest = small.welcome
    thief = Identity.generate()
    others = [
        dataclasses.replace(honest, ca=certificates.create_authority("demo", now=small.now).certificate),
        dataclasses.replace(
            honest, federation=dataclasses.replace(small.federation, coordinator=thief.public.hex()).to_bytes()
        ),
        dataclasses.replace(honest, federation=dataclasses.replace(small.federation, n_min=4).to_bytes()),
        dataclasses.replace(
            honest, federation=dataclasses.replace(small.federation, members=small.federation.members[1:]).to_bytes()
        ),
    ]
    assert len({one.fingerprint for one in [honest, *others]}) == 5
    assert dataclasses.replace(honest, site="west", certificate=b"x").fingerprint == honest.fingerprint


def test_the_signature_is_for_this_purpose_and_leaves_nothing_out(world):
    made = world.welcome
    unsigned = dataclasses.replace(made, signature="").to_bytes()
    signed = Writer().text("offsite welcome").field(unsigned).done()
    assert made.signature == world.coordinator.sign(signed).hex()
