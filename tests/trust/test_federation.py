"""The manifest that every owner signs: canonical, complete, and each epoch following the epoch before."""

import dataclasses
import itertools
import json
from datetime import UTC, datetime, timedelta

import pytest

from offsite.errors import ConfigError, MalformedMessage, OffsiteError, Untrusted
from offsite.trust import canonical
from offsite.trust import federation_manifest as room
from offsite.trust.federation_manifest import FederationManifest, changes, check_follows, check_signatures, sign
from offsite.trust.identity import Identity
from offsite.trust.wire import Writer


def signed(world, federation=None):
    return {site: sign(federation or world.federation, keys.identity) for site, keys in world.keys.items()}


def next_epoch(federation, **changed):
    following = {"epoch": federation.epoch + 1, "previous": federation.digest().hex()}
    return dataclasses.replace(federation, **(following | changed))


def test_round_trip_and_signatures(world):
    read = FederationManifest.from_bytes(world.federation.to_bytes())
    assert read == world.federation
    assert json.loads(read.to_bytes())["members"][0]["site"] == "east"
    check_signatures(read, signed(world))


def test_every_flipped_byte_of_a_signed_manifest_is_refused(world):
    data, signatures = world.federation.to_bytes(), signed(world)
    masks = (0x01, 0x02, 0x20) if world.federation.suite == 1 else (0x01,)
    for place, mask in itertools.product(range(len(data)), masks):
        altered = bytearray(data)
        altered[place] ^= mask
        with pytest.raises(OffsiteError):
            check_signatures(FederationManifest.from_bytes(bytes(altered)), signatures)
    for site, place in itertools.product(signatures, range(64)):
        altered = bytearray(signatures[site])
        altered[place] ^= 1 << (place % 8)
        with pytest.raises(Untrusted, match=site):
            check_signatures(world.federation, signatures | {site: bytes(altered)})


def test_every_owner_has_to_sign_and_nobody_else(small):
    good = signed(small)
    for site in good:
        with pytest.raises(Untrusted, match=rf"sites=\['{site}'\] have not signed"):
            check_signatures(small.federation, {s: one for s, one in good.items() if s != site})
        with pytest.raises(Untrusted, match=site):
            check_signatures(small.federation, good | {site: sign(small.federation, Identity.generate())})
        with pytest.raises(Untrusted):
            check_signatures(small.federation, good | {site: b""})
    with pytest.raises(Untrusted, match="'south' is not in epoch 1"):
        check_signatures(small.federation, good | {"south": sign(small.federation, Identity.generate())})
    swapped = good | {"east": good["west"], "west": good["east"]}
    with pytest.raises(Untrusted):
        check_signatures(small.federation, swapped)


def test_a_signature_is_for_one_manifest_and_one_purpose(small):
    for field, value in (
        ("n_min", 4),
        ("accomplices", 0),
        ("clip", 101.0),
        ("max_epsilon", 80.0),
        ("epoch", 2),
        ("name", "demo2"),
    ):
        with pytest.raises(Untrusted):
            check_signatures(dataclasses.replace(small.federation, **{field: value}), signed(small))
    bare = {site: keys.identity.sign(small.federation.digest()) for site, keys in small.keys.items()}
    other = Writer().text("offsite welcome").field(small.federation.digest()).done()
    elsewhere = {site: keys.identity.sign(other) for site, keys in small.keys.items()}
    unnamed = Writer().field(small.federation.digest()).done()
    anything = {site: keys.identity.sign(unnamed) for site, keys in small.keys.items()}
    for wrong in (bare, elsewhere, anything):
        with pytest.raises(Untrusted):
            check_signatures(small.federation, wrong)


def test_an_owner_signs_the_sentence_of_a_weaker_federation(small):
    """A signature over the manifest alone, as of a release that does not show the sentence, does not count."""
    weak = dataclasses.replace(small.federation, accomplices=0)
    assert "only while at most 0 of the 3 sites help it; usual is a third, which is 1" in weak.weaker
    assert small.federation.weaker == dataclasses.replace(small.federation, n_min=4, accomplices=2).weaker == ""
    check_signatures(weak, {site: sign(weak, keys.identity) for site, keys in small.keys.items()})
    unshown = Writer().text("offsite federation").field(weak.digest()).done()
    for site, keys in small.keys.items():
        signatures = {name: sign(weak, other.identity) for name, other in small.keys.items()}
        with pytest.raises(Untrusted, match=f"'{site}' has not signed"):
            check_signatures(weak, signatures | {site: keys.identity.sign(unshown)})


def altered_member(federation, **changed):
    first, *rest = federation.members
    return dataclasses.replace(federation, members=(dataclasses.replace(first, **changed), *rest))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"name": "a/b"}, ConfigError),
        ({"epoch": 0}, MalformedMessage),
        ({"epoch": 2}, MalformedMessage),
        ({"epoch": True}, MalformedMessage),
        ({"previous": "00" * 32}, MalformedMessage),
        ({"suite": 3}, MalformedMessage),
        ({"n_min": 2}, MalformedMessage),
        ({"n_min": 3.0}, MalformedMessage),
        ({"accomplices": 2}, MalformedMessage),
        ({"accomplices": -1}, MalformedMessage),
        ({"accomplices": True}, MalformedMessage),
        ({"scale": 64}, MalformedMessage),
        ({"clip": 0.0}, MalformedMessage),
        ({"clip": -1.0}, MalformedMessage),
        ({"clip": 1}, MalformedMessage),
        ({"max_epsilon": 0.0}, MalformedMessage),
        ({"max_epsilon": "8"}, MalformedMessage),
        ({"coordinator": "AB" * 32}, MalformedMessage),
        ({"coordinator": "ab" * 31}, MalformedMessage),
        ({"created": "2026-11-24 12:00"}, MalformedMessage),
        ({"expires": "2026-11-24T12:00:00Z"}, MalformedMessage),
        ({"members": "north"}, MalformedMessage),
    ],
    ids=str,
)
def test_fields_out_of_range_are_refused(small, change, error):
    with pytest.raises(error):
        FederationManifest.from_bytes(dataclasses.replace(small.federation, **change).to_bytes())


def test_nobody_takes_part_twice(small):
    first, second, _ = small.federation.members
    for name in ("identity", "sealing", "node", "tls"):
        twice = altered_member(small.federation, **{name: getattr(second, name)})
        with pytest.raises(Untrusted, match="share a name or key"):
            FederationManifest.from_bytes(twice.to_bytes())
    with pytest.raises(Untrusted, match="share a name or key"):
        FederationManifest.from_bytes(altered_member(small.federation, site="NORTH").to_bytes())
    with pytest.raises(Untrusted, match="poses as a site"):
        FederationManifest.from_bytes(dataclasses.replace(small.federation, coordinator=first.identity).to_bytes())
    for name in ("", "../x", "coordinator", "Coordinator", "x" * 64, "nörth", ".", "-x"):
        with pytest.raises(ConfigError):
            FederationManifest.from_bytes(altered_member(small.federation, site=name).to_bytes())
    turned = dataclasses.replace(small.federation, members=small.federation.members[::-1])
    with pytest.raises(MalformedMessage, match="sorted"):
        FederationManifest.from_bytes(turned.to_bytes())
    for change in ({"node": "x"}, {"identity": "zz"}, {"tls": ""}, {"sealing": ""}, {"site": None}):
        with pytest.raises(OffsiteError):
            FederationManifest.from_bytes(altered_member(small.federation, **change).to_bytes())


def test_epochs_follow_one_another(small):
    first = small.federation
    second = next_epoch(first, n_min=4)
    check_follows(second, first)
    assert FederationManifest.from_bytes(second.to_bytes()) == second
    for wrong in (
        dataclasses.replace(second, previous=second.digest().hex()),
        dataclasses.replace(second, epoch=3),
        dataclasses.replace(second, epoch=1, previous=""),
        dataclasses.replace(second, name="other"),
        dataclasses.replace(second, coordinator=Identity.generate().public.hex()),
        first,
    ):
        with pytest.raises(Untrusted):
            check_follows(wrong, first)


def test_changes_name_what_the_owner_confirms(small):
    first, (east, north, _) = small.federation, small.federation.members
    moved = (dataclasses.replace(east, site="south"), dataclasses.replace(north, tls="00" * 32))
    second = next_epoch(first, members=(moved[1], moved[0]), max_epsilon=80.0)
    assert changes(first, second) == (
        "added: south",
        "removed: east",
        "removed: west",
        "new keys: north",
        "max_epsilon: 8.0 becomes 80.0",
    )
    assert changes(first, first) == ()
    new = changes(None, first)
    assert {"added: east", "added: north", "added: west", "n_min: 3", "max_epsilon: 8.0", "clip: 100.0"} <= set(new)


def test_a_changed_contact_is_shown(small):
    moved = altered_member(next_epoch(small.federation), contact="Coordinator's desk, +49 30 2")
    assert changes(small.federation, moved) == ("new contact: east",)


def test_the_member_list_has_one_fingerprint_for_equal_lists_only(small):
    """What owners read to each other changes with a member, a name, a contact and a key, and not with a renewal."""
    federation = small.federation
    renewed = next_epoch(federation, max_epsilon=4.0, expires="2028-11-24T12:00:00Z")
    assert renewed.members_fingerprint == federation.members_fingerprint
    others = [federation.members_fingerprint, dataclasses.replace(federation, name="demo2").members_fingerprint]
    others.append(dataclasses.replace(federation, members=federation.members[:2]).members_fingerprint)
    for field in dataclasses.fields(federation.members[0]):
        value = getattr(federation.members[0], field.name)[::-1]
        altered = altered_member(federation, **{field.name: value})
        others.append(altered.members_fingerprint)
        assert federation.fingerprint_of("north") == altered.fingerprint_of("north")
    assert len(set(others)) == len(others) == 3 + 6


def test_a_members_fingerprint_is_that_of_its_request(world):
    for site, request in world.requests.items():
        assert world.federation.fingerprint_of(site) == request.fingerprint
    with pytest.raises(Untrusted, match="'south' is not in epoch 1"):
        world.federation.fingerprint_of("south")


def test_every_field_is_shown_to_the_owner(small):
    """A field that is added later must be shown too."""
    shown = " ".join(changes(None, small.federation))
    for field in dataclasses.fields(FederationManifest):
        if field.name not in ("epoch", "previous", "members", "created"):
            assert f"{field.name}: " in shown, field.name


def test_expiry(small):
    begin, end = datetime(2026, 11, 24, 12, tzinfo=UTC), datetime(2027, 11, 24, 12, tzinfo=UTC)
    assert small.federation.check_valid(begin) == 365
    assert small.federation.check_valid(begin - timedelta(minutes=10)) == 365  # a clock that is a little behind
    assert small.federation.check_valid(end - timedelta(days=30)) == 30
    for now, state in ((end, "expired"), (begin - timedelta(hours=2), "not yet valid")):
        with pytest.raises(Untrusted, match=f"epoch 1 of federation 'demo' is {state}"):
            small.federation.check_valid(now)


def test_too_many_members_are_refused(small):
    many = dataclasses.replace(small.federation, members=small.federation.members[:1] * (room.MAX_SITES + 1))
    with pytest.raises(MalformedMessage, match="at most 1000"):
        FederationManifest.from_bytes(many.to_bytes())


NASTY = [None, True, -1, 0.5, 2**70, "", "ü", "\ud800", "\x00", "a" * 70_000, [], {}, [None], [[]], [{}]]
LEGAL = [("clip", 0.5), ("max_epsilon", 0.5), ("previous", ""), ("members", [])]


@pytest.mark.parametrize("value", NASTY, ids=lambda value: repr(value)[:12])
def test_a_field_of_any_other_kind_is_one_of_our_errors(small, value):
    """Somebody else's program wrote the manifest: only an error of ours may come out."""
    content = json.loads(small.federation.to_bytes())
    for name in content:
        if (name, value) not in LEGAL:
            with pytest.raises(OffsiteError):
                FederationManifest.from_bytes(canonical.dump(content | {name: value}))
    for name in content["members"][0]:
        if (name, value) == ("contact", ""):
            continue
        first = content["members"][0] | {name: value}
        with pytest.raises(OffsiteError):
            FederationManifest.from_bytes(canonical.dump(content | {"members": [first, *content["members"][1:]]}))
    for name, legal in LEGAL:
        FederationManifest.from_bytes(canonical.dump(content | {name: legal}))
