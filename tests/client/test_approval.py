"""Doctor, approval and training make the same checks, from the declared number of records and the ledger."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from offsite.client.home.declared_records import declare, declared, places
from offsite.client.home.jobs import Jobs
from offsite.client.home.policy import Policy
from offsite.client.service.approval import approve, site_plan, withdraw
from offsite.client.service.doctor import _data, _ledger, _policy
from offsite.errors import (
    ConfigError,
    DataError,
    MalformedMessage,
    OffsiteError,
    PolicyRefusal,
    PrivacyRefusal,
    UnknownName,
)
from offsite.privacy.calibrate import public_delta
from offsite.protos.job_manifest import JobManifest
from offsite.protos.signed_job import sign_job
from tests.memory_federation import NOW, World, WorldHome, make_world, policy_for


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(fed, tmp_path_factory.mktemp("approval"))


class OwnedHome(WorldHome):
    """The folder of a site with a data file; `rules` stands in the place of its policy file."""

    rules: Policy

    def read_policy(self) -> Policy:
        return self.rules


def home(world: World, folder: Path, count: int, declared: dict[str, Any] | None = None, **rules: Any) -> OwnedHome:
    (folder / "state").mkdir(parents=True, exist_ok=True)
    made = OwnedHome(world, "ash", folder)
    made.settings = dataclasses.replace(made.settings, **({"records": 0, "blocks": 0} | (declared or {})))
    made.rules = policy_for(folder, **({"min_records": 20} | rules))
    write(folder, count)
    return made


def write(folder: Path, count: int) -> None:
    (folder / "data.csv").write_text("text\n" + "\n".join(["w1 w2 w3 w4"] * count))


def offered(world: World, site: OwnedHome, **changed: Any) -> str:
    job: JobManifest = dataclasses.replace(world.manifest, **({"split": "truncate"} | changed))
    content = job.to_bytes()
    jobs, digest = Jobs(site.state / "jobs"), job.digest().hex()
    jobs.keep(content, sign_job(world.coordinator, content), digest)
    jobs.show(digest, now=NOW)
    return digest


def test_an_approval_sets_the_whole_job_aside(world: World, tmp_path: Path) -> None:
    site = home(world, tmp_path, 100)
    approval, plan = approve(site, offered(world, site), by="owner", now=NOW)
    digest = approval.approved
    assert Jobs(site.state / "jobs").approved(NOW) == {digest}
    (entry,) = [json.loads(line) for line in (site.state / "ledger-main.jsonl").read_text().splitlines()]
    assert entry["kind"] == "reserve"
    fields = entry["fields"]
    assert (fields["job"], fields["records"], fields["job_delta"]) == (digest, 100, 1e-6)
    assert (fields["noise_multiplier"], fields["sample_rate"]) == (plan.noise_multiplier, plan.sample_rate)
    assert fields["steps"] == world.manifest.steps == plan.steps
    assert fields["epsilon_total"] == 0.0
    assert fields["epsilon_committed"] == pytest.approx(plan.epsilon, abs=1e-9)
    assert 7.9 < plan.epsilon <= world.manifest.privacy.epsilon
    approve(site, digest, by="owner", now=NOW)  # once more changes nothing
    assert site.ledger(site.rules).head()[0] == 1


REFUSED: dict[str, tuple[dict[str, Any], type[OffsiteError], str]] = {
    "too few for the owner": ({"min_records": 101}, PolicyRefusal, "records=100: policy.toml has min_records=101"),
    "another count": ({"declared": {"records": 99}}, DataError, "records=100 in the data: 99 are declared"),
    "more declared": ({"declared": {"records": 101}}, DataError, "records=100 in the data: 101 are declared"),
    "no room": ({"epsilon_cap": 8.0, "spent": True}, PrivacyRefusal, "with the whole job at delta=1e-06: the cap"),
    "model": ({"models": ()}, PolicyRefusal, "models permits none"),
    "no blocks": ({"split": "blocks"}, ConfigError, "site.toml blocks=0: this job cuts the texts into blocks"),
    "batch": ({"batch": 51}, PrivacyRefusal, "records=100: fewer than twice the expected batch=51"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_training_would_refuse_is_not_approved(world: World, tmp_path: Path, why: str) -> None:
    given, kind, words = REFUSED[why]
    given, changed = dict(given), dict[str, Any]()
    if batch := given.pop("batch", 0):
        changed["privacy"] = dataclasses.replace(world.manifest.privacy, batch=batch)
    if split := given.pop("split", ""):
        changed["split"] = split
    spent = given.pop("spent", False)
    site = home(world, tmp_path, 100, **given)
    if spent:
        approve(site, offered(world, site, identifier="ab" * 32), by="owner", now=NOW)
    before = site.ledger(site.rules).head()
    digest = offered(world, site, **changed)
    with pytest.raises(kind, match=words):
        approve(site, digest, by="owner", now=NOW)
    assert digest not in Jobs(site.state / "jobs").approved(NOW)
    assert site.ledger(site.rules).head() == before


@pytest.mark.parametrize("count", [40, 100, 533, 534, 9_999, 10_001, 1_000_000])
def test_the_template_refuses_no_number_of_records_for_its_delta(world: World, tmp_path: Path, count: int) -> None:
    """A delta_cap of 1e-3 once refused every site below 534 records, after doctor and approval had said ok."""
    path = tmp_path / "policy.toml"
    path.write_text(Policy.template())
    policy = Policy.read(path)
    assert public_delta(count) <= policy.delta_cap
    if count < policy.min_records:
        with pytest.raises(PolicyRefusal, match="min_records=100"):
            site_plan(policy, world.manifest, count)
    elif count <= 534:
        assert site_plan(policy, world.manifest, count).delta == public_delta(count) == 1e-6


def test_a_smaller_delta_of_the_owner_holds(world: World, tmp_path: Path) -> None:
    site = home(world, tmp_path, 100, delta_cap=1e-8)
    _, plan = approve(site, offered(world, site), by="owner", now=NOW)
    assert plan.delta == 1e-8
    assert site.ledger(site.rules).standing().delta == 1e-8
    assert plan.noise_multiplier > site_plan(policy_for(tmp_path), world.manifest, 100).noise_multiplier


def test_doctor_says_what_an_approval_meets(world: World, tmp_path: Path) -> None:
    site = home(world, tmp_path, 100)
    assert "100 records" in _data(site)
    assert "first approval keeps the number" in _data(site)
    assert declare(site) == 100
    assert "100 records as declared" in _data(site)
    write(tmp_path, 99)
    with pytest.raises(DataError, match=r"records=99 in the data: 100 are declared, .* records = 99 in site\.toml"):
        _data(site)
    site.rules = dataclasses.replace(site.rules, min_records=101)
    with pytest.raises(PolicyRefusal, match=r"records=100: policy\.toml has min_records=101"):
        _policy(site)
    site.settings = dataclasses.replace(site.settings, blocks=500)
    assert _policy(site) == "automatic approval"
    assert _ledger(site) == "epsilon 0.000 of 60 spent, 0.000 with approved jobs, at delta 1e-06"


def test_the_number_is_counted_once_and_the_owners_word_counts_more(world: World, tmp_path: Path) -> None:
    site = home(world, tmp_path, 100)
    assert declared(site) is None
    assert declare(site, "causal_lm") == 100
    write(tmp_path, 250)
    assert (declare(site), places(site, "truncate", "causal_lm")) == (100, 100)
    site.settings = dataclasses.replace(site.settings, records=250, blocks=30)
    assert (declare(site), places(site, "truncate", "causal_lm")) == (250, 250)
    assert places(site, "blocks", "causal_lm") == 30
    site.settings = dataclasses.replace(site.settings, records=0)
    for content in ("{", "[]", '{"records": 0}', '{"records": "100"}', '{"records": true}', "{}"):
        (site.state / "records-main.json").write_text(content)
        with pytest.raises(MalformedMessage, match=r"records-main\.json: damaged; write records = N in site\.toml"):
            declared(site)


def test_another_declared_number_does_not_change_an_approved_job(world: World, tmp_path: Path) -> None:
    site = home(world, tmp_path, 100)
    digest = offered(world, site)
    approve(site, digest, by="owner", now=NOW)
    write(tmp_path, 120)
    site.settings = dataclasses.replace(site.settings, records=120)
    with pytest.raises(PrivacyRefusal, match="the ledger has this job with other numbers"):
        approve(site, digest, by="owner", now=NOW)


@pytest.mark.parametrize(("key", "value"), [("records", -1), ("records", 10**9 + 1), ("blocks", -1)])
def test_a_number_that_is_none_is_refused(world: World, key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{key}={value}: must be from 0 to"):
        dataclasses.replace(WorldHome(world, "ash", Path()).settings, **{key: value})


def test_a_withdrawal_frees_what_the_job_had_set_aside(world: World, tmp_path: Path) -> None:
    site = home(world, tmp_path, 100)
    digest = offered(world, site)
    approve(site, digest, by="owner", now=NOW)
    assert site.ledger(site.rules).reserved_jobs() == {digest}
    assert withdraw(site, digest[:12], by="owner", now=NOW) == (digest, True)
    assert site.ledger(site.rules).reserved_jobs() == frozenset()
    assert Jobs(site.state / "jobs").approved(NOW) == frozenset()
    with pytest.raises(UnknownName, match="approved jobs: none"):
        withdraw(site, digest, by="owner", now=NOW)
