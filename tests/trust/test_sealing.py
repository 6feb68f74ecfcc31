"""Sealed boxes: published vectors through a second HPKE written from RFC 9180, and every box that must not open."""

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from offsite.errors import UnknownName, Untrusted
from offsite.trust.sealing import CLASSIC, HYBRID, PUBLIC_BYTES, SealingKey, read_public, seal

vectors = pytest.importorskip("cryptography_vectors")
KEMS = {CLASSIC: 0x0020, HYBRID: 0x647A}
SUITES = [CLASSIC, HYBRID]


def published():
    """The test vectors of draft-ietf-hpke-pq, which name the KEM's shared secret."""
    with vectors.open_vector_file("HPKE/hpke-pq-test-vectors.json", "r") as file:
        return [{k: bytes.fromhex(v) if isinstance(v, str) else v for k, v in one.items()} for one in json.load(file)]


def cases(suite):
    return [one for one in published() if one["kem_id"] == KEMS[suite]]


def labeled_extract(suite_id, salt, label, material):
    mac = HMAC(salt or bytes(32), SHA256())
    mac.update(b"HPKE-v1" + suite_id + label + material)
    return mac.finalize()


def labeled_expand(suite_id, secret, label, info, size):
    full = size.to_bytes(2, "big") + b"HPKE-v1" + suite_id + label + info
    return HKDFExpand(SHA256(), size, full).derive(secret)


def schedule(kem, aead, shared_secret, info):
    """Key and base nonce of RFC 9180, section 5.1, in base mode with HKDF-SHA256."""
    suite_id = b"HPKE" + kem.to_bytes(2, "big") + (1).to_bytes(2, "big") + aead.to_bytes(2, "big")
    context = b"\x00" + labeled_extract(suite_id, b"", b"psk_id_hash", b"")
    context += labeled_extract(suite_id, b"", b"info_hash", info)
    secret = labeled_extract(suite_id, shared_secret, b"secret", b"")
    return labeled_expand(suite_id, secret, b"key", context, 32), labeled_expand(
        suite_id, secret, b"base_nonce", context, 12
    )


def test_the_tests_own_schedule_is_the_published_one():
    """Compared on the published vectors with HKDF-SHA256 and a 32-byte AEAD key."""
    case = next(one for one in cases(HYBRID) if one["kdf_id"] == 1)
    key, nonce = schedule(KEMS[HYBRID], case["aead_id"], case["shared_secret"], case["info"])
    assert (key, nonce) == (case["key"], case["base_nonce"])
    first = case["encryptions"][0]
    plain = ChaCha20Poly1305(key).decrypt(nonce, bytes.fromhex(first["ct"]), bytes.fromhex(first["aad"]))
    assert plain.hex() == first["pt"]


@pytest.mark.parametrize("suite", SUITES)
def test_a_published_key_opens_a_box_made_of_a_published_secret(suite):
    """The KEM's bytes and secret come from the vector; key schedule and AES-256-GCM come from this file."""
    for case in cases(suite):
        key = SealingKey.from_bytes(bytes([suite]) + case["skRm"])
        assert key.public == case["pkRm"]
        secret, nonce = schedule(KEMS[suite], 2, case["shared_secret"], b"offsite test")
        box = case["enc"] + AESGCM(secret).encrypt(nonce, b"the package key", None)
        assert key.open(box, b"offsite test") == b"the package key"
    assert cases(suite)


def test_a_box_of_ours_opens_by_the_other_implementation():
    key = SealingKey.generate(CLASSIC)
    box = seal(CLASSIC, key.public, b"hello", b"info")
    private = X25519PrivateKey.from_private_bytes(key.to_bytes()[1:])
    sent = box[:32]
    exchanged = private.exchange(read_public(CLASSIC, sent))
    kem_id = b"KEM" + KEMS[CLASSIC].to_bytes(2, "big")
    eae = labeled_extract(kem_id, b"", b"eae_prk", exchanged)
    shared = labeled_expand(kem_id, eae, b"shared_secret", sent + key.public, 32)
    secret, nonce = schedule(KEMS[CLASSIC], 2, shared, b"info")
    assert AESGCM(secret).decrypt(nonce, box[32:], None) == b"hello"


@pytest.mark.parametrize("suite", SUITES)
def test_boxes_open_for_their_key_and_purpose_only(suite):
    key, other = SealingKey.generate(suite), SealingKey.generate(suite)
    box = seal(suite, key.public, b"secret", b"job 1")
    assert SealingKey.from_bytes(key.to_bytes()).open(box, b"job 1") == b"secret"
    assert seal(suite, key.public, b"secret", b"job 1") != box
    assert b"secret" not in box
    for opener, info in ((other, b"job 1"), (key, b"job 2"), (key, b""), (SealingKey.generate(3 - suite), b"job 1")):
        with pytest.raises(Untrusted, match="does not open"):
            opener.open(box, info)


@pytest.mark.parametrize("suite", SUITES)
def test_no_flipped_or_cut_box_opens(suite):
    key = SealingKey.generate(suite)
    box = seal(suite, key.public, b"secret", b"info")
    for place in range(len(box)):
        altered = bytearray(box)
        altered[place] ^= 1 << (place % 8)
        with pytest.raises(Untrusted):
            key.open(bytes(altered), b"info")
    for size in {*range(0, len(box), 13), len(box) - 1}:
        with pytest.raises(Untrusted):
            key.open(box[:size], b"info")
    with pytest.raises(Untrusted):
        key.open(box + b"\x00", b"info")


@pytest.mark.parametrize("suite", SUITES)
def test_bad_public_keys_are_refused(suite):
    good = SealingKey.generate(suite).public
    assert len(good) == PUBLIC_BYTES[suite]
    for bad in (b"", good[:-1], good + b"\x00", bytes(len(good)), b"\xff" * len(good)):
        if suite == CLASSIC and bad == b"\xff" * len(good):
            continue  # X25519 accepts every 32 bytes except points of small order
        with pytest.raises(Untrusted):
            seal(suite, bad, b"secret", b"info")


def test_unknown_suites_and_damaged_keys_are_refused():
    with pytest.raises(UnknownName, match="suite='3'"):
        SealingKey.generate(3)
    with pytest.raises(UnknownName):
        seal(3, bytes(32), b"", b"")
    for raw in (b"", bytes(33), b"\x03" + bytes(32), b"\x01" + bytes(31), b"\x02" + bytes(33)):
        with pytest.raises(Untrusted):
            SealingKey.from_bytes(raw)


def test_a_key_does_not_show_itself():
    key = SealingKey.generate(HYBRID)
    assert key.to_bytes()[1:].hex() not in repr(key)
    assert "private=***" in repr(key)
