"""A site's keys: private on disk, never overwritten, and in no file that leaves the site."""

import base64
import hashlib
import shutil
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key, load_ssh_public_key

from offsite.errors import ConfigError, DataError, Untrusted
from offsite.trust.keys import IDENTITY, NODE, SEALING, TLS, SiteKeys, check_node_public
from offsite.trust.sealing import HYBRID

NAMES = (IDENTITY, SEALING, TLS, NODE)


@pytest.fixture
def folder(tmp_path):
    SiteKeys.create(tmp_path / "keys", HYBRID)
    return tmp_path / "keys"


def secrets(keys):
    """Every form of private key material that a site has, as bytes."""
    seed = keys.sealing.to_bytes()[1:]
    tls = load_pem_private_key(keys.tls.read_bytes(), None).private_numbers().private_value
    node = load_ssh_private_key(keys.node.read_bytes(), None).private_numbers().private_value
    stretched = hashlib.shake_256(seed).digest(96)
    return [keys.identity.to_bytes(), seed, stretched[:64], stretched[64:], tls.to_bytes(32), node.to_bytes(48)]


def found(secret, data):
    """Whether a secret stands in the data: raw, in hexadecimal, or inside base64 at any of its three alignments."""
    flat = data.replace(b"\\n", b"").replace(b"\n", b"")
    forms = [secret, secret.hex().encode(), secret.hex().upper().encode()]
    forms += [base64.b64encode(bytes(shift) + secret)[4 if shift else 0 : -4] for shift in range(3)]
    return any(form in flat or form in data for form in forms)


def test_the_scan_finds_what_it_looks_for(folder):
    keys = SiteKeys.load(folder)
    for name, secret in zip((IDENTITY, SEALING, TLS, NODE), [secrets(keys)[i] for i in (0, 1, 4, 5)], strict=True):
        assert found(secret, (folder / name).read_bytes()), name
    assert found(secrets(keys)[0], b'{"key":"' + secrets(keys)[0].hex().encode() + b'"}')


def test_nothing_that_leaves_holds_a_private_key(world):
    leaves = [one.to_bytes() for one in world.requests.values()]
    leaves += [world.federation.to_bytes(), world.welcome.to_bytes(), world.welcome.certificate]
    ca = load_pem_private_key(world.authority.key_pem(), None).private_numbers().private_value.to_bytes(32)
    every = [secret for keys in world.keys.values() for secret in secrets(keys)]
    for data in leaves:
        assert b"PRIVATE" not in data
        for secret in [*every, ca, world.coordinator.to_bytes()]:
            assert not found(secret, data)


def test_files_are_private_and_stay_as_they_are(folder):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    before = {name: (folder / name).read_bytes() for name in NAMES}
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in NAMES} == {0o600}
    with pytest.raises(ConfigError, match="never overwritten"):
        SiteKeys.create(folder, HYBRID)
    assert {name: (folder / name).read_bytes() for name in NAMES} == before


def test_two_sites_share_no_key(folder, tmp_path):
    one, other = SiteKeys.load(folder), SiteKeys.create(tmp_path / "other", HYBRID)
    assert one.identity.public != other.identity.public
    assert one.sealing.public != other.sealing.public
    assert one.node_public() != other.node_public()
    assert one.tls_public() != other.tls_public()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_key_that_others_can_read_is_refused(folder, name, mode):
    (folder / name).chmod(mode)
    with pytest.raises(Untrusted, match=f"mode {mode:o}"):
        SiteKeys.load(folder)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_and_missing_keys_are_refused(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(Untrusted):
        SiteKeys.load(folder)
    path.unlink()
    with pytest.raises(DataError, match=name):
        SiteKeys.load(folder)


def test_a_kill_while_keys_are_made_leaves_none(folder, tmp_path):
    """Keys that a killed process left never become anybody's keys."""
    half = tmp_path / "site" / "keys.making"
    half.mkdir(parents=True)
    shutil.copy(folder / IDENTITY, half / IDENTITY)
    made = SiteKeys.create(tmp_path / "site" / "keys", HYBRID)
    assert made.identity.public != SiteKeys.load(folder).identity.public
    assert not half.exists()


def test_the_kinds_are_those_that_flower_and_tls_want(folder):
    keys = SiteKeys.load(folder)
    tls = load_pem_private_key(keys.tls.read_bytes(), None)
    node = load_ssh_private_key(keys.node.read_bytes(), None)
    assert isinstance(tls.curve, ec.SECP256R1)
    assert isinstance(node.curve, ec.SECP384R1)
    assert keys.node.read_bytes().startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    assert load_ssh_public_key(keys.node_public().encode()).public_numbers() == node.public_key().public_numbers()


def test_node_keys_of_another_form_are_refused(folder):
    line = SiteKeys.load(folder).node_public()
    check_node_public(line)
    p256 = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBA=="
    for bad in ("", line + " comment", line + "\n", " " + line, line[:-4], line.replace("384", "256", 1), p256, "ü"):
        with pytest.raises(Untrusted):
            check_node_public(bad)
