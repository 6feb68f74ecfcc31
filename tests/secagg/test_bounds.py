"""The bounds of the design page that a test can check: memory, bytes, decoded error; `bench.secagg` measures time."""

import hashlib
import json
import tracemalloc

import numpy as np
import pytest

from bench.secagg import StandIn, flower, main, make_terms, ours
from offsite.secagg import agreement, signed_bodies
from offsite.secagg.collector import Collector
from offsite.secagg.journal import MemoryJournal
from offsite.secagg.member import Member
from offsite.trust.identity import Identity

MIB = 1 << 20


def round_of_one(length, members):
    """Takes all five steps of one member among stand-ins, with a large vector only; returns what the member sent."""
    identity, others = Identity.generate(), [StandIn(f"site{place:02}") for place in range(1, members)]
    terms = make_terms(others, identity, length)
    member = Member(terms, "site00", identity, MemoryJournal())
    update = np.full(length, 0.25, dtype=np.float32)
    sent = [member.keys(update)]
    roster = [sent[0], *(each.keys(terms) for each in others)]
    agreed = agreement.agree(terms, roster)
    sent.append(member.shares(roster))
    message, vector = member.masked([each.shares(agreed) for each in others])
    announcement = signed_bodies.write_announcement(
        agreed.transcript, {each.site: bytes(32) for each in others} | {"site00": message.body}
    )
    sent += [message, member.survivors(announcement)]
    body = hashlib.sha256(announcement).digest()
    signed = [signed_bodies.sign(e.identity, signed_bodies.SURVIVORS, agreed.transcript, e.site, body) for e in others]
    sent.append(member.unmask([*signed, sent[-1]]))
    return sent, vector


def test_peak_memory_of_a_member_is_two_vectors():
    length = 4_000_000
    tracemalloc.start()
    try:
        round_of_one(length, 10)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 2 * 4 * length <= peak <= 2 * 4 * length + 4 * MIB


def test_collector_holds_one_accumulator_and_one_upload(federation):
    """Ten uploads in a row, each freed after it was added; the final sum adds its decoded copy."""
    length = 1_000_000
    round_ = federation(10, length=length).until("masked")
    collector = round_.collector
    round_.updates.clear()
    tracemalloc.start()
    try:
        for site in round_.sites:
            message, vector = round_.members[site].masked(collector.inbox(site))
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            collector.add_masked(message, vector)
            del vector
            assert tracemalloc.get_traced_memory()[1] - before <= MIB
    finally:
        tracemalloc.stop()
    assert isinstance(collector, Collector)


@pytest.mark.parametrize("members", [3, 10, 50])
def test_upload_is_within_one_percent_of_the_plain_vector(members):
    length = 1_000_000
    sent, vector = round_of_one(length, members)
    total = vector.nbytes + sum(len(message.to_bytes()) for message in sent)
    assert total <= 1.01 * 4 * length


@pytest.mark.parametrize("n", [3, 10, 50])
def test_decoded_error_is_a_millionth(federation, n):
    round_ = federation(n, length=2000)
    result = round_.run()
    truth = sum(update.astype(np.float64) for update in round_.updates.values())
    assert np.linalg.norm(result.decoded - truth) <= 1e-6 * np.linalg.norm(truth)


def test_bench_measures_both_and_writes_json(tmp_path, capsys):
    pytest.importorskip("flwr")
    update = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    assert ours(update, 4)[1] < flower(update, 4)[1]
    out = tmp_path / "bench.json"
    assert main(["--sizes", "3000", "--members", "4", "--repeats", "1", "--without", "ckks", "--out", str(out)]) == 0
    result = json.loads(out.read_text())[0]
    assert result["systems"].keys() == {"ours", "flower"}
    assert "bar >= 4x" in capsys.readouterr().out
