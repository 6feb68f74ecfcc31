"""A frozen round, derived twice: by the package, and by a slow second implementation that shares no line with it.

The second implementation is plain Python: AES-256 and X25519 from their standards, HKDF from `hmac`, hashes over bytes
that are laid out by hand. Only Ed25519 comes from a library; RFC 8032 is checked elsewhere.
"""

import hashlib
import hmac
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from offsite.secagg import agreement, mask, signed_bodies
from offsite.secagg.params import SecAggParams
from offsite.secagg.signed_bodies import KEYS, Keys
from offsite.trust.identity import Identity

FROZEN = json.loads((Path(__file__).parents[1] / "vectors" / "secagg_transcript.json").read_text())
P = 2**255 - 19


def slow_x25519(scalar, u):
    """RFC 7748, section 5, the Montgomery ladder."""
    k = bytearray(scalar)
    k[0] &= 248
    k[31] = k[31] & 127 | 64
    number, x1 = int.from_bytes(k, "little"), int.from_bytes(u, "little") % 2**255 % P
    x2, z2, x3, z3 = 1, 0, x1, 1
    for bit in reversed(range(255)):
        if number >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb, aa, bb = d * a, c * b, a * a, b * b
        x3, z3 = (da + cb) ** 2 % P, x1 * (da - cb) ** 2 % P
        e = aa - bb
        x2, z2 = aa * bb % P, e * (aa + 121665 * e) % P
        if number >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, P - 2, P) % P).to_bytes(32, "little")


def times(a, b):
    """Product in GF(2**8) with the polynomial of AES."""
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a = a << 1 ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return product


def make_box():
    box = []
    for value in range(256):
        inverse = next((other for other in range(256) if times(value, other) == 1), 0)
        turned = [inverse << turn | inverse >> 8 - turn for turn in range(5)]
        box.append((turned[0] ^ turned[1] ^ turned[2] ^ turned[3] ^ turned[4] ^ 0x63) & 0xFF)
    return box


BOX = make_box()


def slow_aes256(key, block):
    """FIPS 197, sections 5.1 and 5.2."""
    words = [list(key[at : at + 4]) for at in range(0, 32, 4)]
    constant = 1
    for place in range(8, 60):
        word = list(words[-1])
        if place % 8 == 0:
            word = [BOX[byte] for byte in word[1:] + word[:1]]
            word[0] ^= constant
            constant = times(constant, 2)
        elif place % 8 == 4:
            word = [BOX[byte] for byte in word]
        words.append([a ^ b for a, b in zip(word, words[place - 8], strict=True)])
    state = list(block)
    for turn in range(15):
        if turn:
            state = [BOX[state[(place + 4 * (place % 4)) % 16]] for place in range(16)]
        if 0 < turn < 14:
            state = [
                times(state[c + r], 2)
                ^ times(state[c + (r + 1) % 4], 3)
                ^ state[c + (r + 2) % 4]
                ^ state[c + (r + 3) % 4]
                for c in range(0, 16, 4)
                for r in range(4)
            ]
        round_key = [byte for word in words[4 * turn : 4 * turn + 4] for byte in word]
        state = [a ^ b for a, b in zip(state, round_key, strict=True)]
    return bytes(state)


def slow_mask(key, length):
    stream = b"".join(slow_aes256(key, struct.pack(">QQ", 0, number)) for number in range(-(-length // 4)))
    return [int.from_bytes(stream[4 * place : 4 * place + 4], "little") for place in range(length)]


def slow_hkdf(secret, salt, info):
    """RFC 5869 for one block of SHA-256."""
    key = hmac.new(salt, secret, hashlib.sha256).digest()
    return hmac.new(key, info + b"\x01", hashlib.sha256).digest()


def join(*fields):
    return b"".join(struct.pack(">I", len(field)) + field for field in fields)


def slow_round(case):
    """Derives every value of the frozen round from its inputs, in hexadecimal."""
    terms, sites = case["terms"], sorted(case["sites"])
    raw = {
        site: {name: bytes.fromhex(text) for name, text in case["sites"][site].items() if name != "ring"}
        for site in sites
    }
    identity = {site: Ed25519PrivateKey.from_private_bytes(raw[site]["identity"]) for site in sites}
    fields = [b"offsite secagg open", struct.pack(">Q", 1), terms["federation"].encode()]
    fields += [struct.pack(">Q", terms["epoch"]), struct.pack(">Q", terms["round"])]
    fields += [bytes.fromhex(terms[name]) for name in ("nonce", "manifest", "emulator", "adapter", "config")]
    fields += [struct.pack(">Q", len(sites))]
    for site in sites:
        fields += [site.encode(), identity[site].public_key().public_bytes_raw()]
    fields += [struct.pack(">Q", terms[name]) for name in ("n_min", "accomplices", "length")]
    fields += [struct.pack(">d", terms["clip"])]
    t0 = hashlib.sha256(join(*fields)).digest()
    base = (9).to_bytes(32, "little")
    signed = []
    for site in sites:
        commitment = hashlib.sha256(join(b"offsite secagg commit", t0, site.encode(), raw[site]["seed"])).digest()
        body = join(slow_x25519(raw[site]["channel"], base), slow_x25519(raw[site]["mask"], base), commitment)
        signature = identity[site].sign(join(b"offsite secagg signed", b"keys", t0, site.encode(), body))
        signed.append(join(site.encode(), body, signature))
    t1 = hashlib.sha256(join(b"offsite secagg roster", t0, *signed)).digest()
    length, uploads = terms["length"], {}
    for site in sites:
        key = slow_hkdf(raw[site]["seed"], t1, join(b"offsite secagg self", t1, site.encode()))
        total = [a + b for a, b in zip(case["sites"][site]["ring"], slow_mask(key, length), strict=True)]
        for peer in sites:
            if peer != site:
                secret = slow_x25519(raw[site]["mask"], slow_x25519(raw[peer]["mask"], base))
                both = sorted((site.encode(), peer.encode()))
                words = slow_mask(slow_hkdf(secret, t1, join(b"offsite secagg pair", t1, *both)), length)
                sign = 1 if site < peer else -1
                total = [a + sign * b for a, b in zip(total, words, strict=True)]
        uploads[site] = [value % 2**32 for value in total]
    return {"t0": t0.hex(), "t1": t1.hex(), "uploads": uploads}


def our_round(case):
    """Derives the same values with the functions of the package."""
    terms, sites = case["terms"], case["sites"]
    identities = {site: Identity.from_bytes(bytes.fromhex(sites[site]["identity"])) for site in sorted(sites)}
    digests = {name: bytes.fromhex(terms[name]) for name in ("nonce", "manifest", "emulator", "adapter", "config")}
    plain = {name: terms[name] for name in ("federation", "epoch", "round", "n_min", "accomplices", "length", "clip")}
    agreed_on = SecAggParams(roster=tuple((site, each.public) for site, each in identities.items()), **plain, **digests)
    scalars = {
        site: {name: int.from_bytes(bytes.fromhex(sites[site][name]), "little") for name in ("channel", "mask")}
        for site in identities
    }
    seeds = {site: int(sites[site]["seed"], 16) for site in identities}
    signed = []
    for site, identity in identities.items():
        points = {name: agreement.public_of(scalar) for name, scalar in scalars[site].items()}
        body = Keys(commitment=agreement.commit(agreed_on, site, seeds[site]), **points).to_bytes()
        signed.append(signed_bodies.sign(identity, KEYS, agreed_on.t0(), site, body))
    agreed, uploads = agreement.agree(agreed_on, signed), {}
    for site in identities:
        vector = np.array(sites[site]["ring"], dtype=np.uint32)
        mask.add(vector, agreement.self_key(seeds[site], agreed.transcript, site))
        for peer in identities:
            if peer != site:
                secret = agreement.exchange(
                    agreement.private_of(scalars[site]["mask"]), agreed.keys[peer].mask, peer=peer
                )
                change = mask.add if site < peer else mask.subtract
                change(vector, agreement.pair_key(secret, agreed.transcript, site, peer))
        uploads[site] = vector.tolist()
    return {"t0": agreed_on.t0().hex(), "t1": agreed.transcript.hex(), "uploads": uploads}


def test_slow_pieces_give_the_published_values():
    fips = slow_aes256(bytes(range(32)), bytes.fromhex("00112233445566778899aabbccddeeff"))  # FIPS 197, C.3
    assert fips.hex() == "8ea2b7ca516745bfeafc49904b496089"
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")  # RFC 7748, 5.2
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    assert slow_x25519(scalar, point).hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"


@pytest.mark.parametrize("derive", [slow_round, our_round])
def test_frozen_round(derive):
    assert derive(FROZEN["inputs"]) == FROZEN["outputs"]


def test_frozen_uploads_without_self_masks_add_up_to_the_plain_sum():
    inputs, total = FROZEN["inputs"], np.zeros(FROZEN["inputs"]["terms"]["length"], dtype=np.uint32)
    for site, upload in FROZEN["outputs"]["uploads"].items():
        total += np.array(upload, dtype=np.uint32)
        seed = int(inputs["sites"][site]["seed"], 16)
        mask.subtract(total, agreement.self_key(seed, bytes.fromhex(FROZEN["outputs"]["t1"]), site))
    rings = [inputs["sites"][site]["ring"] for site in inputs["sites"]]
    assert total.tolist() == [sum(column) % 2**32 for column in zip(*rings, strict=True)]


def test_slow_implementation_follows_a_live_round(federation):
    """The uploads of real members, computed from their secrets after the keys step."""
    round_ = federation(4, length=9)
    round_.keys()
    case = {"terms": {**vars(round_.terms)}, "sites": {}}
    for name in ("nonce", "manifest", "emulator", "adapter", "config"):
        case["terms"][name] = case["terms"][name].hex()
    for site, member in round_.members.items():
        secret = member._secrets
        case["sites"][site] = {
            "identity": round_.identities[site].to_bytes().hex(),
            "channel": secret.channel.to_bytes(32, "little").hex(),
            "mask": secret.mask.to_bytes(32, "little").hex(),
            "seed": secret.seed.to_bytes(32, "big").hex(),
            "ring": secret.vector.tolist(),
        }
    round_.shares()
    round_.masked()
    expected = slow_round(case)
    assert round_.collector._agreed.transcript.hex() == expected["t1"]
    assert {site: upload.tolist() for site, upload in round_.uploads.items()} == expected["uploads"]
