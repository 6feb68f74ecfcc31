"""Published vectors through our own functions: RFC 3686, 5869, 7748, 8032 and 9591."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from offsite.errors import ConfigError, ProtocolViolation, TooFewSurvivors
from offsite.secagg import agreement, mask, shamir
from offsite.trust.identity import Identity, verify

vectors = pytest.importorskip("cryptography_vectors")
FROST = json.loads((Path(__file__).parents[1] / "vectors" / "frost_p256.json").read_text())


def blocks(path):
    """The `NAME = value` blocks of a vector file."""
    with vectors.open_vector_file(path, "r") as file:
        lines = [line.strip() for line in file if " = " in line]
    found = []
    for line in lines:
        name, _, value = line.partition(" = ")
        if name == "COUNT":
            found.append({})
        found[-1][name.strip()] = value.strip()
    return found


def test_mask_words_are_the_keystream_of_rfc_3686():
    cases = blocks("ciphers/AES/CTR/aes-256-ctr.txt")
    for case in cases:
        plain, cipher = bytes.fromhex(case["PLAINTEXT"]), bytes.fromhex(case["CIPHERTEXT"])
        stream = mask.Keystream(bytes.fromhex(case["KEY"]), initial=bytes.fromhex(case["IV"]))
        words = stream.words(len(plain) // 4).astype("<u4").tobytes()
        assert bytes(a ^ b for a, b in zip(plain, words, strict=True)) == cipher
    assert len(cases) == 3


def test_mask_is_the_encryption_of_the_block_numbers():
    """Counter mode by definition, from single-block AES, over more than one chunk and a final partial block."""
    key, length = bytes(range(32)), (1 << 18) + 4099
    total = np.zeros(length, dtype=np.uint32)
    mask.add(total, key)
    numbers = b"".join(number.to_bytes(16, "big") for number in range(-(-length // 4)))
    expected = np.frombuffer(Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update(numbers), dtype="<u4")
    np.testing.assert_array_equal(total, expected[:length])
    mask.subtract(total, key)
    assert not total.any()


def test_masks_of_many_keys_add_and_cancel():
    generator = np.random.default_rng(1)
    values = generator.integers(0, 2**32, 70_000, dtype=np.uint32)
    keys = [generator.bytes(32) for _ in range(4)]
    one_by_one, together = values.copy(), values.copy()
    for key in keys[:2]:
        mask.add(one_by_one, key)
    for key in keys[2:]:
        mask.subtract(one_by_one, key)
    mask.apply(together, added=keys[:2], subtracted=keys[2:])
    np.testing.assert_array_equal(one_by_one, together)
    mask.apply(together, added=keys[2:], subtracted=keys[:2])
    np.testing.assert_array_equal(together, values)


@pytest.mark.parametrize(
    "call",
    [
        lambda: mask.Keystream(bytes(31)),
        lambda: mask.add(np.zeros(4, np.uint32), bytes(16)),
        lambda: mask.apply(np.zeros(4, np.uint32), added=[bytes(32)], subtracted=[bytes(32)]),
        lambda: mask.add(np.zeros(4, np.int64), bytes(32)),
        lambda: mask.add(np.zeros(8, np.uint32)[::2], bytes(32)),
    ],
)
def test_mask_refuses(call):
    with pytest.raises(ConfigError):
        call()


def test_exchange_is_x25519_of_rfc_7748():
    cases = blocks("asymmetric/X25519/rfc7748.txt")
    for case in cases:
        scalar = int.from_bytes(bytes.fromhex(case["INPUT_SCALAR"]), "little")
        for number in (scalar, agreement.clamp(scalar)):
            assert (
                agreement.exchange(agreement.private_of(number), bytes.fromhex(case["INPUT_U"]), peer="p").hex()
                == case["OUTPUT_U"]
            )
    assert len(cases) >= 3


def test_identity_is_ed25519_of_rfc_8032():
    with vectors.open_vector_file("asymmetric/Ed25519/sign.input", "r") as file:
        lines = file.read().splitlines()[:128]
    for line in lines:
        private, public, message, signed = (bytes.fromhex(part) for part in line.split(":")[:4])
        identity = Identity.from_bytes(private[:32])
        assert identity.public == public
        assert identity.sign(message) == signed[:64]
        verify(public, message, signed[:64], sender="a")
        with pytest.raises(ProtocolViolation):
            verify(public, message + b"x", signed[:64], sender="a")
    assert Identity.from_bytes(identity.to_bytes()).public == identity.public


def test_identity_refuses_other_lengths():
    with pytest.raises(ConfigError, match="31 bytes"):
        Identity.from_bytes(bytes(31))


def numbers(*texts):
    return [int(text, 16) for text in texts]


def test_shamir_shares_are_those_of_rfc_9591():
    polynomial = numbers(FROST["group_secret_key"], *FROST["share_polynomial_coefficients"])
    for place, share in FROST["participant_shares"].items():
        assert shamir.to_bytes(shamir.evaluate(polynomial, int(place))).hex() == share


def test_shamir_reconstructs_the_secret_of_rfc_9591():
    shares = {
        int(place): shamir.from_bytes(bytes.fromhex(share)) for place, share in FROST["participant_shares"].items()
    }
    for chosen in itertools.chain(itertools.combinations(shares, 2), [tuple(shares)]):
        secret = shamir.combine({place: shares[place] for place in chosen}, threshold=FROST["threshold"])
        assert shamir.to_bytes(secret).hex() == FROST["group_secret_key"]
    point = ec.derive_private_key(secret, ec.SECP256R1()).public_key().public_numbers()
    assert f"{2 + point.y % 2:02x}{point.x:064x}" == FROST["group_public_key"]


@pytest.mark.parametrize(("n", "t"), [(3, 3), (7, 5), (10, 7), (64, 43)])
def test_shamir_any_threshold_of_shares_gives_the_secret(n, t):
    generator = np.random.default_rng(n)
    for secret in (0, 1, shamir.ORDER - 1, agreement.new_scalar()):
        shares = shamir.split(secret, threshold=t, points=range(1, n + 1))
        for _ in range(5):
            chosen = generator.permutation(n)[:t] + 1
            assert shamir.combine({int(p): shares[int(p)] for p in chosen}, threshold=t) == secret


def test_shamir_shares_below_the_threshold_fit_every_secret():
    """t-1 shares and any guess lie on one polynomial of degree t-1, so they say nothing."""
    shares = shamir.split(42, threshold=4, points=range(1, 7))
    held = {place: shares[place] for place in (1, 3, 6)}
    with pytest.raises(TooFewSurvivors, match="shares=3"):
        shamir.combine(held, threshold=4)
    for guess in (0, 7, shamir.ORDER - 1):
        fourth = interpolate({0: guess, **held}, at=2)
        assert shamir.combine({**held, 2: fourth}, threshold=4) == guess


def interpolate(points, *, at):
    """Lagrange interpolation anywhere, by the textbook sum."""
    total = 0
    for x, y in points.items():
        weight = 1
        for other in points:
            if other != x:
                weight = weight * (at - other) * pow(x - other, -1, shamir.ORDER) % shamir.ORDER
        total += y * weight
    return total % shamir.ORDER


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: shamir.split(shamir.ORDER, threshold=2, points=[1, 2]), ConfigError),
        (lambda: shamir.split(-1, threshold=2, points=[1, 2]), ConfigError),
        (lambda: shamir.split(1, threshold=3, points=[1, 2]), ConfigError),
        (lambda: shamir.split(1, threshold=0, points=[1, 2]), ConfigError),
        (lambda: shamir.split(1, threshold=2, points=[1, 1]), ConfigError),
        (lambda: shamir.split(1, threshold=2, points=[0, 1]), ConfigError),
        (lambda: shamir.combine({0: 1, 1: 1}, threshold=2), ProtocolViolation),
        (lambda: shamir.combine({1: shamir.ORDER, 2: 1}, threshold=2), ProtocolViolation),
        (lambda: shamir.from_bytes(b"\xff" * 32), ProtocolViolation),
        (lambda: shamir.from_bytes(b"\x00" * 31), ProtocolViolation),
    ],
)
def test_shamir_refuses(call, error):
    with pytest.raises(error):
        call()
