"""A site's cost of secure aggregation: offsite's, Flower's SecAgg+ functions and TenSEAL CKKS, in one process.

`python -m bench.secagg --sizes 1e6 1e7 --members 10 --out secagg.json`

CPU seconds are `time.process_time` (all threads) of one site, the median over repeats that take turns between the
systems. Bytes are the uploads of that site in the whole round. Only the measured site holds a vector: the other sites
are stand-ins with real keys, shares and signatures, because their time is not measured.

Counted for offsite: all five steps, SHA-256 of update and upload, journal in memory. Counted for Flower: the same steps
as `secaggplus_mod` with its default ranges, and `ndarray_to_bytes`. Counted for CKKS (N=8192, [60, 40, 40]): encryption
and serialisation; decryption of the sum, which a site would also pay, is left out in favour of CKKS.
"""

import argparse
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offsite.errors import ConfigError
from offsite.secagg import agreement, shamir, signed_bodies
from offsite.secagg.journal import MemoryJournal
from offsite.secagg.member import Member
from offsite.secagg.params import SecAggParams
from offsite.secagg.signed_bodies import KEYS, SHARES, SURVIVORS, Keys, Signed
from offsite.trust.collusion import fewest_in_sum, usual_accomplices
from offsite.trust.identity import Identity

CLIP = 1.0
BARS = {"flower": 4.0, "ckks": 30.0}
BYTES_BAR = 1.01
Cost = tuple[float, int]


class Stopwatch:
    """Adds up the CPU seconds of the measured site's work."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts the CPU time of the context."""
        start = time.process_time()
        yield
        self.seconds += time.process_time() - start


class StandIn:
    """Another site of the round, without an update: keys, shares and a signature on the survivors."""

    def __init__(self, site: str) -> None:
        self.site = site
        self.identity = Identity.generate()
        self.channel, self.mask = agreement.new_scalar(), agreement.new_scalar()

    def keys(self, terms: SecAggParams) -> Signed:
        """Returns a real keys message."""
        points = {"channel": agreement.public_of(self.channel), "mask": agreement.public_of(self.mask)}
        body = Keys(commitment=agreement.commit(terms, self.site, 1), **points).to_bytes()
        return signed_bodies.sign(self.identity, KEYS, terms.t0(), self.site, body)

    def shares(self, agreed: agreement.Agreed) -> Signed:
        """Returns a shares message with ciphertexts that can be opened."""
        sealed, private = {}, agreement.private_of(self.channel)
        for peer, keys in agreed.keys.items():
            if peer != self.site:
                secret = agreement.exchange(private, keys.channel, peer=peer)
                sealed[peer] = agreement.seal(secret, agreed.transcript, self.site, peer, (1, shamir.ORDER - 1))
        body = signed_bodies.write_sealed(sealed)
        return signed_bodies.sign(self.identity, SHARES, agreed.transcript, self.site, body)


def make_terms(stand_ins: list[StandIn], identity: Identity, length: int) -> SecAggParams:
    """Returns the parameters of a round of one measured site and stand-ins; updates have `length` coordinates."""
    roster = sorted([("site00", identity.public), *((each.site, each.identity.public) for each in stand_ins)])
    return SecAggParams(
        federation="bench",
        epoch=1,
        round=1,
        nonce=os.urandom(16),
        roster=tuple(roster),
        n_min=fewest_in_sum(usual_accomplices(len(roster))),
        accomplices=usual_accomplices(len(roster)),
        length=length,
        clip=CLIP,
        manifest=bytes(32),
        emulator=bytes(32),
        adapter=bytes(32),
        config=bytes(32),
    )


def ours(update: NDArray[np.float32], members: int) -> Cost:
    """Returns CPU seconds and upload bytes of offsite's member in a whole round."""
    watch, identity = Stopwatch(), Identity.generate()
    others = [StandIn(f"site{place:02}") for place in range(1, members)]
    terms = make_terms(others, identity, update.size)
    with watch.running():
        member = Member(terms, "site00", identity, MemoryJournal())
        sent = [member.keys(update)]
    roster = [sent[0], *(each.keys(terms) for each in others)]
    agreed = agreement.agree(terms, roster)
    inbox = [each.shares(agreed) for each in others]
    with watch.running():
        sent.append(member.shares(roster))
        message, vector = member.masked(inbox)
        upload = vector.tobytes()
    digests = {each.site: bytes(32) for each in others} | {"site00": message.body}
    announcement = signed_bodies.write_announcement(agreed.transcript, digests)
    body = hashlib.sha256(announcement).digest()
    signatures = [signed_bodies.sign(e.identity, SURVIVORS, agreed.transcript, e.site, body) for e in others]
    with watch.running():
        sent += [message, member.survivors(announcement)]
        sent.append(member.unmask([*signatures, sent[-1]]))
    return watch.seconds, len(upload) + sum(len(each.to_bytes()) for each in sent)


def flower(update: NDArray[np.float32], members: int) -> Cost:
    """Returns CPU seconds and upload bytes of the same steps with the functions of `secaggplus_mod`."""
    from flwr.common import ndarray_to_bytes
    from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
    from flwr.common.secure_aggregation.crypto import shamir as theirs
    from flwr.common.secure_aggregation.crypto import symmetric_encryption as sealing
    from flwr.common.secure_aggregation.quantization import quantize
    from flwr.common.secure_aggregation.secaggplus_utils import (
        pseudo_rand_gen,
        share_keys_plaintext_concat,
        share_keys_plaintext_separate,
    )
    from flwr.supercore.primitives import asymmetric

    def pairs() -> tuple[bytes, bytes]:
        private, public = asymmetric.generate_key_pairs()
        return asymmetric.private_key_to_bytes(private), asymmetric.public_key_to_bytes(public)

    def secret(private: bytes, public: bytes) -> bytes:
        keys = asymmetric.bytes_to_private_key(private), asymmetric.bytes_to_public_key(public)
        shared: bytes = sealing.generate_shared_key(*keys)
        return shared

    watch, threshold, scale = Stopwatch(), 2 * members // 3 + 1, 1 << 22
    peers = {peer: (pairs(), pairs()) for peer in range(1, members)}
    with watch.running():
        (mask_private, mask_public), (seal_private, seal_public) = pairs(), pairs()
        seed = os.urandom(32)
        seeds = theirs.create_shares(seed, threshold, members)
        keys = theirs.create_shares(mask_private, threshold, members)
        channel, sealed = {}, {}
        for peer, (_, (_, public)) in peers.items():
            channel[peer] = secret(seal_private, public)
            plain = share_keys_plaintext_concat(0, peer, seeds[peer], keys[peer])
            sealed[peer] = sealing.encrypt(channel[peer], plain)
    arrived = {
        peer: sealing.encrypt(channel[peer], share_keys_plaintext_concat(peer, 0, seeds[0], keys[0])) for peer in peers
    }
    with watch.running():
        held = [share_keys_plaintext_separate(sealing.decrypt(channel[peer], arrived[peer])) for peer in peers]
        values = quantize(arithmetic.parameters_multiply([update], 1.0), 8.0, scale)
        values = arithmetic.factor_combine(scale, values)
        shapes = [each.shape for each in values]
        values = arithmetic.parameters_addition(values, pseudo_rand_gen(seed, 1 << 32, shapes))
        for _, ((_, public), _) in peers.items():
            pair_mask = pseudo_rand_gen(secret(mask_private, public), 1 << 32, shapes)
            values = arithmetic.parameters_subtraction(values, pair_mask)
        uploads = [ndarray_to_bytes(each) for each in arithmetic.parameters_mod(values, 1 << 32)]
    control = [mask_public, seal_public, *sealed.values(), *(share for _, _, share, _ in held), seeds[0]]
    return watch.seconds, sum(len(each) for each in (*uploads, *control))


def ckks(update: NDArray[np.float32], members: int) -> Cost:
    """Returns CPU seconds and upload bytes of CKKS encryption and serialisation, chunk by chunk."""
    del members  # the cost of a site does not depend on the others
    try:
        import tenseal
    except ImportError as error:
        raise ConfigError("baseline=ckks needs tenseal; install the bench extra or pass --without ckks") from error
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, -1, [60, 40, 40], n_threads=1)
    context.global_scale = 2.0**40
    watch, size, slots = Stopwatch(), 0, 4096
    with watch.running():
        for start in range(0, update.size, slots):
            size += len(tenseal.ckks_vector(context, update[start : start + slots].tolist()).serialize())
    return watch.seconds, size


SYSTEMS: dict[str, Callable[[NDArray[np.float32], int], Cost]] = {"ours": ours, "flower": flower, "ckks": ckks}


def measure(size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Returns medians of CPU and bytes for each system at one size; the systems take turns."""
    update = np.random.default_rng(0).uniform(-CLIP, CLIP, size).astype(np.float32)
    samples: dict[str, list[Cost]] = {name: [] for name in SYSTEMS if name not in args.without}
    scaled: dict[str, float] = {}
    for repeat in range(args.repeats):
        for name, costs in samples.items():
            part = update[: args.ckks_limit] if name == "ckks" and args.ckks_limit else update
            factor = update.size / part.size
            scaled |= {name: factor} if factor > 1 else {}
            if name == "ckks" and repeat >= args.ckks_repeats:
                continue
            seconds, size_bytes = SYSTEMS[name](part, args.members)
            costs.append((seconds * factor, round(size_bytes * factor)))
    rows = {
        name: {
            "cpu_seconds": statistics.median(seconds for seconds, _ in costs),
            "cpu_all": [seconds for seconds, _ in costs],
            "bytes": costs[0][1],
            "bytes_per_plain": costs[0][1] / (4 * size),
            "scaled_from_slice": scaled.get(name, 1.0),
        }
        for name, costs in samples.items()
    }
    return {"size": size, "members": args.members, "systems": rows}


def report(result: dict[str, Any]) -> list[str]:
    """Returns the lines of one size's table, with each bar and whether the bar is met."""
    systems, lines = result["systems"], [f"d={result['size']:.0e} members={result['members']}"]
    for name, row in systems.items():
        note = f"  scaled x{row['scaled_from_slice']:g} from a slice" if row["scaled_from_slice"] > 1 else ""
        ratio = row["cpu_seconds"] / systems["ours"]["cpu_seconds"]
        lines.append(
            f"  {name:8} {row['cpu_seconds'] * 1e3:10.1f} ms CPU {ratio:7.2f}x ours "
            f"{row['bytes']:12d} bytes {row['bytes_per_plain']:8.5f} of 4d{note}"
        )
        if name in BARS:
            lines.append(f"           bar >= {BARS[name]:g}x: {'met' if ratio >= BARS[name] else 'NOT met'}")
    met = systems["ours"]["bytes_per_plain"] <= BYTES_BAR
    return [*lines, f"           bar bytes <= {BYTES_BAR} of 4d: {'met' if met else 'NOT met'}"]


def main(argv: list[str] | None = None) -> int:
    """Measures, prints a table and optionally writes JSON."""
    parser = argparse.ArgumentParser(description="client cost of secure aggregation")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 1e7], help="coordinates of an update")
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ckks-repeats", type=int, default=3, help="CKKS is slow; its spread is small")
    parser.add_argument("--ckks-limit", type=int, default=0, help="measure CKKS on this many values and scale; 0 = all")
    parser.add_argument("--without", nargs="*", default=[], choices=["flower", "ckks"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    results = []
    for size in args.sizes:
        results.append(measure(int(size), args))
        print("\n".join(report(results[-1])), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
