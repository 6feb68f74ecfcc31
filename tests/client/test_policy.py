"""The owner's policy: every rule refuses by itself, and the file permits nothing that it does not name."""

import dataclasses
import itertools
import re
import time
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from offsite.adapter.layout import Layout
from offsite.adapter.spec import AdapterSpec
from offsite.client.home.package_room import GIGABYTE, PackageRoom
from offsite.client.home.policy import Policy, permit, permit_now
from offsite.errors import ConfigError, DataError, PolicyRefusal
from offsite.protos.aggregation import AggregationTerms
from offsite.protos.job_manifest import JobManifest, PrivacyTerms

NOON = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
PRIVACY = PrivacyTerms(private=True, epsilon=4.0, max_grad_norm=1.0, accountant="pld", batch=16)
JOB = JobManifest(
    federation="demo",
    epoch=1,
    roster=(("east", "aa"), ("north", "bb"), ("west", "cc")),
    n_min=3,
    accomplices=1,
    task="causal_lm",
    emulator="e1" * 32,
    base="b1" * 32,
    tokenizer="71" * 32,
    adapter=AdapterSpec("ffa_lora", rank=8, slots=("h.0",)),
    layout=Layout(("h.0.lora_B",), ((3, 8),)),
    length=32,
    split="truncate",
    rounds=2,
    local_steps=4,
    learning_rate=0.1,
    update_bound=1.0,
    privacy=PRIVACY,
    physical_batch=8,
    model="smol",
)

SPACE = PackageRoom(GIGABYTE, here=0, ready=False, older=0, free=100 * GIGABYTE, permitted=3.0)
ROOM: dict[str, Any] = {"site": "east", "room": SPACE}


def written(folder: Path, **changed: Any) -> Path:
    """The template with some keys changed; None removes one."""
    lines = []
    for line in Policy.template().splitlines():
        key = line.split(" ")[0]
        value = changed.pop(key, ...)
        lines.append(line if value is ... else "" if value is None else f"{key} = {value}")
    lines += [f"{key} = {value}" for key, value in changed.items()]
    path = folder / "policy.toml"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def wide(tmp_path: Path) -> Policy:
    """A policy that just permits `JOB`."""
    lists = {"models": '["smol"]', "methods": '["ffa_lora"]'}
    return Policy.read(written(tmp_path, **lists, epsilon_cap="4.0", max_rank="8", max_disk_gb="3"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nine hours ahead of UTC, without summer time."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def changed(**fields: Any) -> JobManifest:
    return dataclasses.replace(JOB, **fields)


def test_the_template_is_a_policy_that_permits_no_job(tmp_path: Path) -> None:
    """The template explains every key, asks for each approval, and lets nothing leave beside the update."""
    policy = Policy.read(written(tmp_path))
    assert (policy.models, policy.methods) == ((), ())
    assert policy.splits == ("truncate",)  # the tokenizer has no say in how many records there are
    assert (policy.approval, policy.allow_variants, policy.allow_seeded_noise) == ("manual", False, False)
    assert not policy.allow_individual_updates
    explained = set(re.findall(r"(?m)^(\w+) = .+ # \w+", Policy.template()))
    assert explained == {field.name for field in dataclasses.fields(Policy)} == set(tomllib.loads(Policy.template()))
    with pytest.raises(PolicyRefusal, match=r"model='smol': policy\.toml models permits none"):
        permit(policy, JOB, now=NOON, **ROOM)


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Policy)])
def test_nothing_is_permitted_by_being_forgotten(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"key {key} is missing"):
        Policy.read(written(tmp_path, **{key: None}))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("epsilon_capp", "1.0", "did you mean epsilon_cap"),
        ("epsilon_cap", "0.0", "above 0"),
        ("epsilon_cap", "-1.0", "above 0"),
        ("epsilon_cap", "inf", "finite"),
        ("epsilon_cap", "nan", "finite"),
        ("epsilon_cap", "true", "type float"),
        ("epsilon_cap", '"8"', "type float"),
        ("delta_cap", "0", "between 0 and 1"),
        ("delta_cap", "1", "between 0 and 1"),
        ("delta_cap", "nan", "between 0 and 1"),
        ("min_cohort", "2", "at least 3"),
        ("min_cohort", "3.0", "type int"),
        ("min_records", "0", "at least 1"),
        ("max_rank", "0", "at least 1"),
        ("max_adapter_share", "0.0", "above 0"),
        ("max_adapter_share", "nan", "finite"),
        ("max_threads", "-1", "at least 0"),
        ("max_memory_gb", "-0.5", "at least 0"),
        ("max_memory_gb", "nan", "at least 0"),
        ("max_disk_gb", "-1.0", "at least 0"),
        ("models", '"any"', "must be a list"),
        ("models", "[1]", "type str"),
        ("approval", '"none"', "manual, automatic"),
        ("approval", "false", "type str"),
        ("allow_variants", "1", "type bool"),
        ("allow_individual_updates", '"no"', "type bool"),
        ("allow_seeded_noise", "0", "type bool"),
        ("hours", '"8-18"', "like '20:00-06:00'"),
        ("hours", '"24:00-06:00"', "like '20:00-06:00'"),
        ("hours", '"08:60-09:00"', "like '20:00-06:00'"),
        ("hours", '"08:00-18:00\\n"', "like '20:00-06:00'"),
        ("hours", '"08:00-08:00"', "begins when it ends"),
        ("hours", '""', "like '20:00-06:00'"),
        ("table", "{}", "not known"),
        ("metrics", "[]", "metrics is no longer known: nothing leaves a site but its update, .*; remove the line"),
    ],
)
def test_a_policy_is_read_strictly(tmp_path: Path, key: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Policy.read(written(tmp_path, **{key: value}))
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_policy_that_cannot_be_read_permits_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        Policy.read(tmp_path / "policy.toml")
    (tmp_path / "policy.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        Policy.read(tmp_path / "policy.toml")


def test_a_job_at_every_limit_is_permitted(wide: Policy) -> None:
    permit(wide, JOB, site="east", now=NOON, room=dataclasses.replace(SPACE, free=3 * GIGABYTE))


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (changed(model="other"), "model='other': policy.toml models permits smol"),
        (changed(model=""), "models permits smol"),
        (changed(adapter=AdapterSpec("lora", rank=8, slots=("h.0",))), "method='lora': .* methods permits ffa_lora"),
        (
            changed(metrics=("loss",)),
            "metric='loss': nothing leaves a site but its update; ask the coordinator for a job",
        ),
        (changed(adapter=AdapterSpec("ffa_lora", rank=9, slots=("h.0",))), "rank=9: .* max_rank=8"),
        (changed(n_min=2), "n_min=2: .* min_cohort=3"),
        (changed(privacy=dataclasses.replace(PRIVACY, epsilon=4.01)), r"epsilon=4\.01: .* epsilon_cap=4"),
        (changed(privacy=dataclasses.replace(PRIVACY, epsilon=float("inf"))), "epsilon=inf"),
        (changed(privacy=dataclasses.replace(PRIVACY, epsilon=float("nan"))), "epsilon=nan"),
        (changed(privacy=dataclasses.replace(PRIVACY, private=False)), "private=false"),
    ],
)
def test_each_rule_says_no_by_itself(wide: Policy, job: JobManifest, words: str) -> None:
    with pytest.raises(PolicyRefusal, match=words) as caught:
        permit(wide, job, now=NOON, **ROOM)
    assert "\n" not in str(caught.value)


def test_a_package_must_fit_the_cap_and_the_disk(wide: Policy) -> None:
    large = dataclasses.replace(SPACE, package=GIGABYTE + 2**20)
    with pytest.raises(PolicyRefusal, match=r"disk=3\.00 GiB: .* max_disk_gb=3; set max_disk_gb = 3\.1 there"):
        permit(wide, JOB, site="east", now=NOON, room=large)
    short = dataclasses.replace(SPACE, free=3 * GIGABYTE - 1)
    with pytest.raises(PolicyRefusal, match=r"free_disk=3\.00 GiB: the package needs 3\.00 GiB more"):
        permit(wide, JOB, site="east", now=NOON, room=short)


def test_a_package_that_is_here_needs_no_second_room(wide: Policy) -> None:
    """The offer comes again and again, also while the package's own bytes lie on the disk."""
    for here, free in ((0, 3), (1, 2), (2, 1), (3, 0)):
        permit(
            wide,
            JOB,
            site="east",
            now=NOON,
            room=dataclasses.replace(SPACE, here=here * GIGABYTE, free=free * GIGABYTE),
        )
    ready = dataclasses.replace(SPACE, here=GIGABYTE, ready=True, free=0, permitted=1.0)
    permit(wide, JOB, site="east", now=NOON, room=ready)
    older = dataclasses.replace(SPACE, free=GIGABYTE, older=2 * GIGABYTE)
    permit(wide, JOB, site="east", now=NOON, room=older)  # they make way
    assert older.stays == 0
    assert dataclasses.replace(older, free=3 * GIGABYTE, permitted=4.0).stays == GIGABYTE  # the limit counts them too


def test_without_a_number_a_package_takes_what_it_needs_of_three_quarters(wide: Policy) -> None:
    for free, fits in ((4 * GIGABYTE, True), (4 * GIGABYTE - 4, False)):
        room = dataclasses.replace(SPACE, free=free, permitted=0.0)
        if fits:
            permit(wide, JOB, site="east", now=NOON, room=room)
        else:
            with pytest.raises(PolicyRefusal, match=r"max_disk_gb=0, here 3\.00 GiB; set max_disk_gb = 3\.0"):
                permit(wide, JOB, site="east", now=NOON, room=room)


def test_an_emulator_is_permitted_by_its_digest_and_by_any(wide: Policy) -> None:
    for models in (("e1" * 32,), ("any",), ("x", "smol")):
        permit(dataclasses.replace(wide, models=models), JOB, now=NOON, **ROOM)
    for models in ((), ("e1" * 31,), ("Smol",), ("smo",)):
        with pytest.raises(PolicyRefusal, match="models permits"):
            permit(dataclasses.replace(wide, models=models), JOB, now=NOON, **ROOM)


def test_a_digest_permits_the_emulator_that_this_site_gets(wide: Policy) -> None:
    job = changed(emulators=(("west", "e2" * 32),))
    permitted = dataclasses.replace(wide, models=("e2" * 32,), allow_variants=True)
    permit(permitted, job, now=NOON, **ROOM | {"site": "west"})
    with pytest.raises(PolicyRefusal, match="models permits"):
        permit(permitted, job, now=NOON, **ROOM)


@pytest.mark.parametrize("site", ["east", "west"])
def test_other_emulators_at_other_sites_need_the_owners_word(wide: Policy, site: str) -> None:
    """Both the site that is alone with its emulator and those beside it are asked."""
    job = changed(emulators=(("west", "e2" * 32),))
    with pytest.raises(PolicyRefusal, match=r"emulators=2: .*allow_variants=false"):
        permit(wide, job, now=NOON, **ROOM | {"site": site})
    permit(dataclasses.replace(wide, allow_variants=True), job, now=NOON, **ROOM | {"site": site})


def test_a_job_without_secure_aggregation_needs_the_owners_word(wide: Policy) -> None:
    job = changed(aggregation=AggregationTerms(individuals=True))
    with pytest.raises(PolicyRefusal, match=r"secure aggregation=off: .*allow_individual_updates=false") as caught:
        permit(wide, job, now=NOON, **ROOM)
    assert "\n" not in str(caught.value)
    permit(dataclasses.replace(wide, allow_individual_updates=True), job, now=NOON, **ROOM)
    permit(dataclasses.replace(wide, allow_individual_updates=True), JOB, now=NOON, **ROOM)


def test_a_job_cannot_call_itself_any(wide: Policy) -> None:
    with pytest.raises(PolicyRefusal, match="model='any'"):
        permit(wide, changed(model="any"), now=NOON, **ROOM)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("hours", ["08:00-18:00", "20:00-06:00", "00:00-23:59", "23:59-00:00"])
def test_hours_are_those_of_a_clock_on_the_wall(wide: Policy, hours: str) -> None:
    """Each minute of a day, against a walk from the first hour to the last; the end is outside."""
    begin, end = (int(part[:2]) * 60 + int(part[3:]) for part in hours.split("-"))
    inside, minute = set(), begin
    while minute != end:
        inside.add(minute)
        minute = (minute + 1) % 1440
    policy = dataclasses.replace(wide, hours=hours)
    for minute, second in itertools.product(range(1440), (0, 59)):
        there = datetime(2026, 3, 1, minute // 60, minute % 60, second, tzinfo=UTC)
        if (minute + 9 * 60) % 1440 in inside:
            permit_now(policy, there)
        else:
            with pytest.raises(PolicyRefusal, match=f"hours={hours}"):
                permit_now(policy, there)


@pytest.mark.usefixtures("clock")
def test_a_job_outside_the_hours_is_refused(wide: Policy) -> None:
    with pytest.raises(PolicyRefusal, match=r"time=21:00: .* hours=08:00-18:00"):
        permit(dataclasses.replace(wide, hours="08:00-18:00"), JOB, now=NOON, **ROOM)
