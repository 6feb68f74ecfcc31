"""Parameters, wire format and journal: refused values, and equal bytes for equal values only."""

import json
import multiprocessing
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offsite.errors import ConfigError, DataError, MalformedMessage, ProtocolViolation
from offsite.secagg import signed_bodies
from offsite.secagg.journal import FileJournal, MemoryJournal
from offsite.secagg.params import SecAggParams
from offsite.secagg.signed_bodies import Keys, Signed
from offsite.trust.identity import Identity
from offsite.trust.wire import MAX_BODY_BYTES, Reader, Writer

ROSTER = tuple((site, Identity.generate().public) for site in ("a", "b", "c", "d"))


def make(**changes):
    digests = {name: bytes([place]) * 32 for place, name in enumerate(("manifest", "emulator", "adapter", "config"))}
    terms = {
        "federation": "f",
        "epoch": 1,
        "round": 2,
        "nonce": bytes(16),
        "roster": ROSTER,
        "n_min": 3,
        "accomplices": 1,
    }
    return SecAggParams(**{**terms, "length": 9, "clip": 0.5, **digests, **changes})


@pytest.mark.parametrize(("n", "threshold"), [(3, 3), (4, 3), (5, 4), (6, 5), (10, 7), (50, 34), (64, 43)])
def test_threshold_is_more_than_two_thirds_of_the_invited(n, threshold):
    roster = tuple((f"s{i:02}", bytes([i]) * 32) for i in range(n))
    terms = make(roster=roster, n_min=max(3, n // 3 + 2), accomplices=n // 3)
    assert terms.threshold == threshold
    assert 2 * terms.threshold - n > n // 3  # two quorums share this many sites, more than there are colluders
    assert terms.min_sites == max(threshold, n // 3 + 2)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_min": 2}, "n_min=2"),
        ({"n_min": 5}, "n_min=5 with invited=4"),
        ({"n_min": 3.0}, "n_min=3.0"),
        ({"accomplices": 2}, "n_min=3 with accomplices=2; n_min >= 4"),
        ({"accomplices": -1}, "accomplices=-1"),
        ({"accomplices": True}, "accomplices=True"),
        ({"roster": ROSTER[:2]}, "invited=2"),
        ({"roster": tuple((f"s{i:03}", i.to_bytes(32, "big")) for i in range(65))}, "invited=65"),
        ({"roster": ROSTER[::-1]}, "out of order or twice"),
        ({"roster": (*ROSTER, ROSTER[-1])}, "out of order or twice"),
        ({"roster": (*ROSTER, ("e", ROSTER[0][1]))}, "one public key"),
        ({"roster": (*ROSTER, ("e", b"short"))}, "site='e'"),
        ({"roster": (("", bytes(32)), *ROSTER)}, "site=''"),
        ({"roster": (*ROSTER, ("x" * 129, bytes(32)))}, "site='xxx"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"clip": -1.0}, "clip"),
        ({"clip": float("nan")}, "clip=nan"),
        ({"clip": float("inf")}, "clip=inf"),
        ({"clip": 1e39}, "clip=1e"),
        ({"clip": 1}, "clip=1"),
        ({"length": 0}, "length=0"),
        ({"length": True}, "length=True"),
        ({"epoch": -1}, "epoch=-1"),
        ({"round": 1 << 63}, "round="),
        ({"nonce": bytes(15)}, "nonce=15 bytes"),
        ({"emulator": bytes(31)}, "emulator="),
        ({"manifest": "0" * 32}, "manifest="),
        ({"federation": ""}, "federation="),
        ({"suite": 2}, "suite=2"),
    ],
)
def test_terms_that_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        make(**changes)


def test_t0_covers_every_field():
    changes = {
        "federation": "g",
        "epoch": 0,
        "round": 3,
        "nonce": bytes(17),
        "roster": ROSTER[:3],
        "n_min": 4,
        "accomplices": 0,
        "length": 8,
        "clip": 0.25,
        **dict.fromkeys(("manifest", "emulator", "adapter", "config"), b"x" * 32),
    }
    assert {field.name for field in fields(SecAggParams)} == {*changes, "suite"}
    hashes = [make().t0(), *(make(**{name: value}).t0() for name, value in changes.items())]
    assert len(set(hashes)) == len(hashes)
    assert make().t0() == make().t0()
    shifted = [make(federation="f1", nonce=b"2" * 16).t0(), make(federation="f", nonce=b"12" * 8).t0()]
    assert len(set(shifted)) == 2


@given(st.lists(st.binary(max_size=40)))
def test_fields_come_back_and_have_one_encoding(values):
    writer = Writer()
    for value in values:
        writer.field(value)
    reader = Reader(writer.done(), "test")
    assert [reader.field() for _ in values] == values
    reader.end()


@given(st.lists(st.binary(max_size=8)), st.lists(st.binary(max_size=8)))
def test_different_fields_have_different_bytes(one, other):
    def joined(values):
        writer = Writer()
        for value in values:
            writer.field(value)
        return writer.done()

    assert (joined(one) == joined(other)) == (one == other)


BODIES = {
    "keys": (Keys(bytes(32), bytes(32), bytes(32)).to_bytes(), Keys.from_bytes),
    "shares": (signed_bodies.write_sealed({"a": bytes(80), "b": bytes(80)}), signed_bodies.read_sealed),
    "announcement": (signed_bodies.write_announcement(bytes(32), {"a": bytes(32)}), signed_bodies.read_announcement),
    "unmask": (signed_bodies.write_released({"a": (b"self", 3), "b": (b"mask", 4)}), signed_bodies.read_released),
    "signed": (Signed("a", b"body", bytes(64)).to_bytes(), Signed.from_bytes),
}


@pytest.mark.parametrize("name", BODIES)
def test_every_cut_and_every_extra_byte_is_refused(name):
    body, read = BODIES[name]
    whole = read(body)
    for cut in range(len(body)):
        try:
            assert read(body[:cut]) != whole  # a list may be shorter at a field border, never equal
        except MalformedMessage:
            continue
        assert name in ("shares", "announcement", "unmask")
    with pytest.raises(MalformedMessage):
        read(body + b"\0")
    with pytest.raises(MalformedMessage):
        read(bytes(MAX_BODY_BYTES + 1000))


@given(st.binary(max_size=300))
def test_random_bytes_raise_only_the_named_errors(data):
    for _, read in BODIES.values():
        try:
            read(data)
        except (MalformedMessage, ProtocolViolation):
            continue


def test_readers_refuse_wrong_sizes_kinds_and_order():
    share = bytes(32)
    for body, read in (
        (Writer().text("a").field(bytes(79)).done(), signed_bodies.read_sealed),
        (Writer().text("b").field(bytes(80)).text("a").field(bytes(80)).done(), signed_bodies.read_sealed),
        (Writer().text("a").field(b"both").field(share).done(), signed_bodies.read_released),
        (Writer().text("a" * 129).field(bytes(80)).done(), signed_bodies.read_sealed),
        (Writer().field(b"\xff\xfe").field(bytes(80)).done(), signed_bodies.read_sealed),
    ):
        with pytest.raises(MalformedMessage):
            read(body)
    assert Reader(Writer().number(7).done(), "n").number() == 7
    assert Signed.from_bytes(Signed("å", b"x", bytes(64)).to_bytes()) == Signed("å", b"x", bytes(64))


# journal


@pytest.fixture(params=["memory", "file"])
def journal(request, tmp_path):
    return MemoryJournal() if request.param == "memory" else FileJournal(tmp_path / "journal")


def test_rounds_only_go_up(journal):
    for entry in (("f", 1, 1), ("f", 1, 2), ("g", 1, 1), ("f", 2, 0), ("f", 2, 9)):
        journal.claim(*entry)
    for entry in (("f", 2, 9), ("f", 2, 8), ("f", 1, 99), ("g", 1, 1), ("g", 0, 5)):
        with pytest.raises(ProtocolViolation, match="rounds only go up"):
            journal.claim(*entry)
    journal.claim("g", 1, 2)


def test_an_update_is_spent_once(journal):
    journal.spend(b"x" * 32)
    journal.spend(b"y" * 32)
    with pytest.raises(ProtocolViolation, match="uploaded before"):
        journal.spend(b"x" * 32)


def test_file_journal_remembers_over_restarts_and_is_private(tmp_path):
    path = tmp_path / "journal"
    FileJournal(path).claim("f", 1, 4)
    FileJournal(path).spend(b"x" * 32)
    for again in (lambda: FileJournal(path).claim("f", 1, 4), lambda: FileJournal(path).spend(b"x" * 32)):
        with pytest.raises(ProtocolViolation):
            again()
    assert path.stat().st_mode & 0o077 == 0
    assert [json.loads(line)[0] for line in path.read_text().splitlines()] == ["round", "spent"]


def test_a_line_cut_off_by_a_crash_is_removed(tmp_path):
    path = tmp_path / "journal"
    FileJournal(path).claim("f", 1, 4)
    whole = path.read_bytes()
    path.write_bytes(whole + b'["round","f",1,')
    FileJournal(path).claim("f", 1, 5)
    assert path.read_bytes() == whole + b'["round","f",1,5]\n'


@pytest.mark.parametrize("line", ["junk", '["round","f"]', '["spent","zz"]', '["round","f",1,4]', '{"a":1}', "7"])
def test_a_damaged_journal_is_refused(tmp_path, line):
    path = tmp_path / "journal"
    FileJournal(path).claim("f", 1, 4)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match="is damaged"):
        FileJournal(path).claim("f", 9, 9)


def claim(path, results):
    try:
        FileJournal(path).claim("f", 1, 1)
        results.put("claimed")
    except ProtocolViolation:
        results.put("refused")


def test_of_many_processes_one_claims_a_round(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=claim, args=(Path(tmp_path) / "journal", results)) for _ in range(6)]
    for process in processes:
        process.start()
    outcomes = sorted(results.get(timeout=20) for _ in processes)
    for process in processes:
        process.join()
    assert outcomes == ["claimed"] + ["refused"] * 5


def test_round_is_in_the_file_before_a_key_exists(tmp_path, federation):
    round_ = federation(3)
    path = tmp_path / "journal"
    round_.journals["a0"] = FileJournal(path)
    seen = []

    def rounding(count):
        seen.append(path.stat().st_size)
        return np.zeros(count)

    round_.member("a0").keys(round_.updates["a0"], rounding=rounding)
    assert seen == [len('["round","ward",1,1]\n')]
