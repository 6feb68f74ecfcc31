"""The job manifest: one encoding, every field in its range, and jobs that differ anywhere have different digests."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from offsite.adapter.spec import AdapterSpec
from offsite.errors import ConfigError, MalformedMessage
from offsite.protos.aggregation import AggregationTerms
from offsite.protos.codec import KeysRequest
from offsite.protos.job_manifest import JobManifest, PrivacyTerms
from offsite.protos.messages import MAX_STEPS
from offsite.protos.secagg_params import secagg_params
from tests.client.test_policy import JOB as SHORT

JOB = dataclasses.replace(SHORT, roster=tuple((site, key * 32) for site, key in SHORT.roster))
DATA = JOB.to_bytes()
RULE = JOB.aggregation.to_dict()


def changed(**values: Any) -> bytes:
    return json.dumps(json.loads(DATA) | values, sort_keys=True, separators=(",", ":")).encode()


def test_what_is_written_is_read() -> None:
    assert JobManifest.from_bytes(DATA) == JOB
    assert JobManifest.from_bytes(DATA).digest() == JOB.digest()
    assert (JOB.releases, JOB.steps) == (2, 8)


def test_every_truncation_is_refused() -> None:
    for size in range(len(DATA)):
        with pytest.raises(MalformedMessage):
            JobManifest.from_bytes(DATA[:size])


def test_every_flipped_bit_is_refused_or_another_job() -> None:
    """A digit may become another digit; the result is another job, which the coordinator has not signed."""
    for place in range(len(DATA)):
        for bit in range(8):
            data = DATA[:place] + bytes([DATA[place] ^ 1 << bit]) + DATA[place + 1 :]
            try:
                assert JobManifest.from_bytes(data).digest() != JOB.digest()
            except MalformedMessage:
                continue


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(JobManifest)])
def test_every_field_counts(field: str) -> None:
    content = json.loads(DATA)
    assert field in content
    del content[field]
    with pytest.raises(MalformedMessage):
        JobManifest.from_bytes(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


@pytest.mark.parametrize(
    "values",
    [
        {"rounds": 0},
        {"rounds": True},
        {"rounds": 1.0},
        {"rounds": "2"},
        {"rounds": 1 << 40},
        {"rounds": MAX_STEPS + 1, "local_steps": 1},
        {"rounds": MAX_STEPS // 8 + 1, "local_steps": 8},
        {"rounds": 1, "spare_rounds": MAX_STEPS, "local_steps": 1},
        {"rounds": 1, "spare_rounds": 1 << 31},
        {"rounds": 1000, "spare_rounds": 1000, "local_steps": 501},
        {"local_steps": MAX_STEPS},
        {"local_steps": -1},
        {"length": 0},
        {"length": (1 << 20) + 1},
        {"physical_batch": 0},
        {"physical_batch": (1 << 10) + 1},
        {"spare_rounds": -1},
        {"n_min": 0},
        {"learning_rate": 0.0},
        {"learning_rate": 1},
        {"update_bound": -1.0},
        {"deadline": 0.0},
        {"emulator": "e1"},
        {"base": "B1" * 32},
        {"tokenizer": ""},
        {"identifier": "xyz"},
        {"identifier": "0a"},
        {"identifier": "0a" * 31},
        {"identifier": "0a" * 33},
        {"identifier": "0A" * 32},
        {"task": 1},
        {"model": "ümlaut"},
        {"model": "small\nprivacy    epsilon 0.1 for the whole job"},
        {"split": "blocks\x1b[8m"},
        {"adapter": JOB.adapter.to_dict() | {"method": "lora\r"}},
        {"adapter": JOB.adapter.to_dict() | {"targets": ["q_proj\x07"]}},
        {"metrics": ["loss\n"]},
        {"federation": "x" * 2000},
        {"roster": [["east", "aa"]]},
        {"roster": [["east", "aa" * 32]] * 1001},
        {"metrics": ["x"] * 1001},
        {"metrics": "loss"},
        {"format": 1},
        {"format": 2},
        {"surplus": 1},
        {"privacy": {"private": True}},
        {"privacy": dataclasses.asdict(JOB.privacy) | {"epsilon": "8"}},
        {"privacy": dataclasses.asdict(JOB.privacy) | {"batch": 0}},
        {"privacy": dataclasses.asdict(JOB.privacy) | {"private": 1}},
        {"privacy": dataclasses.asdict(JOB.privacy) | {"max_grad_norm": -1.0}},
        {"emulators": [["north", "e2" * 32], ["east", "e2" * 32]]},
        {"emulators": [["east", "e2" * 32], ["east", "e2" * 32]]},
        {"emulators": [["east", "e2" * 32], ["east", "e3" * 32]]},
        {"emulators": [["south", "e2" * 32]]},
        {"emulators": [["east", "e1" * 32]]},
        {"emulators": [["east", "E2" * 32]]},
        {"emulators": [["east", "e2" * 31]]},
        {"emulators": [["east", ""]]},
        {"emulators": [["east"]]},
        {"emulators": [["east", "e2" * 32, ""]]},
        {"emulators": [[1, "e2" * 32]]},
        {"emulators": {"east": "e2" * 32}},
        {"emulators": [[site, "e2" * 32] for site, _ in JOB.roster]},
        {"aggregation": {}},
        {"aggregation": []},
        {"aggregation": RULE | {"individuals": 1}},
        {"aggregation": RULE | {"individuals": "false"}},
        {"aggregation": RULE | {"alternate": True}},  # this job's method is ffa_lora
        {"aggregation": RULE | {"alternate": None}},
        {"aggregation": RULE | {"proximal": -0.1}},
        {"aggregation": RULE | {"proximal": 1}},
        {"aggregation": RULE | {"proximal": True}},
        {"aggregation": RULE | {"proximal": 10.1}},  # times the learning rate 0.1, the product is above 1
        {"aggregation": RULE | {"surplus": 1}},
        {"aggregation": RULE | {"ranks": [["north", 2], ["east", 2]]}},
        {"aggregation": RULE | {"ranks": [["east", 2], ["east", 2]]}},
        {"aggregation": RULE | {"ranks": [["south", 2]]}},
        {"aggregation": RULE | {"ranks": [["east", 0]]}},
        {"aggregation": RULE | {"ranks": [["east", 8]]}},
        {"aggregation": RULE | {"ranks": [["east", True]]}},
        {"aggregation": RULE | {"ranks": [["east", 2.0]]}},
        {"aggregation": RULE | {"ranks": [[1, 2]]}},
        {"aggregation": RULE | {"ranks": [["east"]]}},
        {"aggregation": RULE | {"ranks": {"east": 2}}},
        {"aggregation": RULE | {"ranks": [["east", 2]]}, "adapter": JOB.adapter.to_dict() | {"method": "lora"}},
        {"layout": {"names": ["a"], "shapes": [[0]]}},
        {"layout": {"names": ["a"], "shapes": [[1 << 31] * 2]}},
        {"layout": {"names": ["a"], "shapes": [[1] * 17]}},
        {"adapter": JOB.adapter.to_dict() | {"rank": 0}},
        {"adapter": JOB.adapter.to_dict() | {"alpha": 1.1e9}},
        {"adapter": JOB.adapter.to_dict() | {"alpha": 9e-10}},
        {"learning_rate": 9e-10},
        {"learning_rate": 1.1e9},
        {"deadline": 1.1e9},
        {"update_bound": 9e-28},
        {"update_bound": 1.1e27},
        {"refresh": -1},
        {"refresh": MAX_STEPS + 1},
        {"privacy": dataclasses.asdict(JOB.privacy) | {"max_grad_norm": 9e-10}},
        {"privacy": dataclasses.asdict(JOB.privacy) | {"max_grad_norm": 1.1e9}},
        {"privacy": dataclasses.asdict(JOB.privacy) | {"epsilon": 1.1e9}},
        {"privacy": dataclasses.asdict(JOB.privacy) | {"batch": 10**9 + 1}},
        {"aggregation": RULE | {"proximal": 9e-10}},
        {"aggregation": RULE | {"directions": 1, "spacing": 9e-6}},
        {"aggregation": RULE | {"directions": 1, "spacing": 1.0}},
        {"aggregation": RULE | {"directions": 1, "spacing": "0.1"}},
    ],
)
def test_a_field_out_of_its_range_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage):
        JobManifest.from_bytes(changed(**values))


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the way to every number of a JSON value."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*way, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield way


def with_number(way: tuple[Any, ...], number: float) -> bytes:
    content = json.loads(FULL.to_bytes())
    inner = content
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = number
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


FULL = dataclasses.replace(
    JOB,
    adapter=dataclasses.replace(JOB.adapter, options=(("a", 1), ("b", 0.5))),
    aggregation=AggregationTerms(proximal=0.5, ranks=(("east", 2),)),
)


@pytest.mark.parametrize("number", [10**400, -(10**400), 1e308, 5e-324, -1e308, 10**18 + 1], ids=lambda n: f"{n!s:.8}")
@pytest.mark.parametrize("way", list(places(json.loads(FULL.to_bytes()))), ids=lambda way: ".".join(map(str, way)))
def test_no_number_is_read_at_the_ends_of_arithmetic(way: tuple[Any, ...], number: float) -> None:
    """Refused, and nothing else: no number may end in an error of arithmetic at a site."""
    if way[:2] == ("adapter", "options") and 0 < number < 1:
        return  # the method says which numbers it takes
    if way == ("adapter", "seed") and number == 10**18 + 1:
        return  # a seed is any number of 63 bits
    with pytest.raises(MalformedMessage):
        JobManifest.from_bytes(with_number(way, number))


@pytest.mark.parametrize(
    "values",
    [
        {"identifier": ""},
        {"identifier": "0a" * 32},
        {"length": 1 << 20, "physical_batch": 1 << 10},
        {"rounds": 1000, "spare_rounds": 1000, "local_steps": 500},
        {"rounds": MAX_STEPS, "local_steps": 1},
        {"emulators": (("east", "e2" * 32), ("west", "e3" * 32))},
        {"learning_rate": 1e9, "update_bound": 1e27, "deadline": 1e9},
        {"learning_rate": 1e-9, "update_bound": 1e-27, "deadline": 1e-9},
        {"privacy": PrivacyTerms(True, 1e9, 1e9, "pld", 10**9), "adapter": AdapterSpec(rank=1 << 16, alpha=1e9)},
        {"privacy": PrivacyTerms(True, 1e-9, 1e-9, "pld", 1), "adapter": AdapterSpec(rank=1, alpha=1e-9)},
        {"aggregation": AggregationTerms(directions=4096, spacing=1e-5)},
        {"aggregation": AggregationTerms(individuals=True, proximal=10.0, ranks=(("east", 7), ("west", 1)))},
    ],
)
def test_the_largest_job_is_read(values: dict[str, Any]) -> None:
    job = dataclasses.replace(JOB, **values)
    assert JobManifest.from_bytes(job.to_bytes()) == job


@pytest.mark.parametrize("word", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_a_number_that_is_none_is_refused(word: bytes) -> None:
    assert b'"learning_rate":0.1' in DATA
    with pytest.raises(MalformedMessage):
        JobManifest.from_bytes(DATA.replace(b'"learning_rate":0.1', b'"learning_rate":' + word))


def test_another_spelling_of_the_same_value_is_refused() -> None:
    for other in (DATA + b" ", b" " + DATA, json.dumps(json.loads(DATA)).encode(), DATA.replace(b"0.1", b"1e-1")):
        with pytest.raises(MalformedMessage):
            JobManifest.from_bytes(other)


def test_a_manifest_of_any_length_is_not_read() -> None:
    with pytest.raises(MalformedMessage, match="at most"):
        JobManifest.from_bytes(b"[" * (1 << 25))
    with pytest.raises(MalformedMessage, match="does not parse"):
        JobManifest.from_bytes(b"[" * 100_000)


def test_everybody_reads_who_gets_which_emulator() -> None:
    """All sites read one job, so that no site gets an emulator that the others do not know of."""
    job = JobManifest.from_bytes(changed(emulators=[["east", "f2" * 32], ["west", "02" * 32]]))
    assert [job.emulator_of(site) for site in ("east", "north", "west")] == ["f2" * 32, "e1" * 32, "02" * 32]
    assert list(job.shipped().items()) == [
        ("e1" * 32, ("north",)),
        ("f2" * 32, ("east",)),
        ("02" * 32, ("west",)),
    ]
    assert JOB.shipped() == {"e1" * 32: ("east", "north", "west")}
    assert job.digest() != JOB.digest()


def test_a_site_with_an_emulator_of_its_own_has_no_sum_with_sites_that_were_not_told() -> None:
    job = dataclasses.replace(JOB, emulators=(("east", "e2" * 32),))
    request = KeysRequest(1, 1, bytes(32), bytes(32), tuple(site for site, _ in JOB.roster))
    assert secagg_params(job, request).t0() != secagg_params(JOB, request).t0()
    assert secagg_params(job, request).t0() == secagg_params(dataclasses.replace(job), request).t0()


def test_a_site_has_no_terms_for_a_cohort_of_helpers() -> None:
    """Of ten sites a coordinator invites one victim and two helpers, whatever its job says of n_min."""
    names = [f"site{place}" for place in range(10)]
    roster = tuple((name, f"{place:02x}" * 32) for place, name in enumerate(names))
    for n_min, invited in ((3, names[:3]), (5, names[:3]), (3, names)):
        job = dataclasses.replace(JOB, roster=roster, n_min=n_min, accomplices=3)
        with pytest.raises(ConfigError, match=f"n_min={n_min} with "):
            secagg_params(job, KeysRequest(1, 1, bytes(32), bytes(32), tuple(invited)))
    job = dataclasses.replace(JOB, roster=roster, n_min=5, accomplices=3)
    terms = secagg_params(job, KeysRequest(1, 1, bytes(32), bytes(32), tuple(names[:7])))
    assert (terms.accomplices, terms.threshold, terms.min_sites) == (3, 6, 6)
