"""A site that is opened for a job: facts about its data reach its owner and nobody else."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from offsite.client.home.audit import Audit
from offsite.client.home.jobs import Jobs
from offsite.client.home.settings import SiteSettings
from offsite.client.service.site_runtime import SiteRuntime
from offsite.client.training.emulator_session import _check_fit, encode_records
from offsite.emulator.runtime.refresh import plain_of
from offsite.errors import ConfigError, DataError, PolicyRefusal, UnsupportedModel
from offsite.privacy.ledger import Ledger
from offsite.protos.job_manifest import JobManifest
from offsite.task.causal_lm import CausalLM
from offsite.task.examples import Examples
from offsite.task.records import fault
from offsite.task.spec import Record
from tests.memory_federation import NOW, World, make_world, policy_for


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(fed, tmp_path_factory.mktemp("opening"))


def opened(world: World, folder: Path, data: str, declared: dict[str, Any] | None = None, **policy: Any) -> SiteRuntime:
    """An open site with one data file."""
    (folder / "data.csv").write_text(data)
    settings = SiteSettings("ash", "data.csv", column="text", **(declared or {}))
    home = SimpleNamespace(settings=settings, data=folder / "data.csv", state=folder)
    home.keys = SimpleNamespace(identity=world.identities["ash"])
    rules = policy_for(folder, **policy)
    ledger = Ledger(folder / "ledger.jsonl", dataset="main", epsilon_cap=9.0, delta=1e-6, accountant="rdp")
    audit = Audit(folder / "audit.jsonl")
    return SiteRuntime(cast(Any, home), rules, audit, ledger, Jobs(folder / "jobs"), lambda: NOW)


RECORDS = "text\n" + "\n".join(["w1 w2 w3 w4 w5 w6"] * 7)


@pytest.mark.parametrize(
    ("data", "declared", "secret", "kind"),
    [
        (RECORDS, {}, "records=7: policy.toml has min_records=100", PolicyRefusal),
        (RECORDS, {"records": 100}, "records=7 in the data: 100 are declared", DataError),
        (RECORDS, {"records": 6}, "records=7 in the data: 6 are declared", DataError),
        ("Mr Smith has the flu,1950\nMs Jones is well,1960\n", {}, "Mr Smith", DataError),
    ],
)
def test_what_a_refusal_says_of_the_data_stays_here(
    world: World, tmp_path: Path, data: str, declared: dict[str, Any], secret: str, kind: type[Exception]
) -> None:
    """Whether the data cannot be read, are too few or are not as many as declared: the answer is the same."""
    site = opened(world, tmp_path, data, declared, min_records=100)
    with pytest.raises(DataError, match=r"data do not fit this job now; its owner sees why in the site's log") as told:
        site.open_site(rowwise(world), world.session)
    assert type(told.value) is DataError
    assert secret not in str(told.value)
    assert told.value.__cause__ is None
    assert secret in (tmp_path / "audit.jsonl").read_text()
    with pytest.raises(kind, match=secret):  # a dry run belongs to the owner
        site.open_dry_run(rowwise(world), world.run.store.package, tmp_path / "rounds")


def rowwise(world: World) -> JobManifest:
    """The job with one record for each text."""
    return dataclasses.replace(world.manifest, split="truncate")


class Choosy:
    """A tokenizer that a coordinator made to learn who has what."""

    eos_token_id, largest_id = 0, 9

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.start, self.end = ids, list[int](), list[int]()

    def tokens(self, texts: Sequence[str], length: int | None = None) -> list[list[int]]:
        return [self.ids if "w13" in text else [1, 2, 3] for text in texts]


@pytest.mark.parametrize("ids", [[], [1], [10**6, 1], [2**31, 1]])
def test_what_a_tokenizer_meets_does_not_tell_whether_a_job_fits(world: World, tmp_path: Path, ids: list[int]) -> None:
    """Two owners, one of whom has the word in every record: both sites open, with as many records."""
    session = dataclasses.replace(world.session, processor=cast(Any, Choosy(ids)))
    plans = []
    for word in ("w12", "w13"):
        (tmp_path / word).mkdir()
        data = "text\n" + "\n".join([f"w1 {word} w3"] * 40)
        site = opened(world, tmp_path / word, data, min_records=40)
        plans.append(site.open_site(rowwise(world), session).plan)
    assert plans[0] == plans[1]
    assert plans[0].records == 40


@pytest.mark.parametrize("ids", [[], [1], [1, 2, 3], list(range(1, 10)) * 7])
def test_what_a_tokenizer_makes_of_texts_changes_no_number(world: World, tmp_path: Path, ids: list[int]) -> None:
    """Blocks: two owners, one with the word in every text. Both have the declared number of places, and one noise."""
    session = dataclasses.replace(world.session, processor=cast(Any, Choosy(ids)))
    sites = []
    for word in ("w12", "w13"):
        (tmp_path / word).mkdir()
        data = "text\n" + "\n".join([f"w1 {word} w3"] * 40)
        site = opened(world, tmp_path / word, data, {"blocks": 30}, min_records=30)
        sites.append(site.open_site(world.manifest, session))
    assert sites[0].plan == sites[1].plan
    assert [len(site._job.examples) for site in sites] == [sites[0].plan.records] * 2 == [30, 30]


def test_blocks_without_a_declared_number_are_refused(world: World, tmp_path: Path) -> None:
    site = opened(world, tmp_path, RECORDS, {"records": 7}, min_records=1)
    with pytest.raises(ConfigError, match=r"blocks=0: this job .* write blocks = N in site\.toml"):
        site.reserve(world.manifest)
    assert site.ledger.head()[0] == 0


def test_the_noise_does_not_tell_how_many_records_are_readable(world: World, tmp_path: Path) -> None:
    """The count is taken once; whatever the file is later, the plan keeps the first number or the job is refused."""
    site = opened(world, tmp_path, "text\n" + "\n".join(["w1 w2 w3"] * 41), min_records=41)
    plan = site.open_site(rowwise(world), world.session).plan
    (tmp_path / "data.csv").write_text("text\n" + "\n".join(["w1 w2 w3"] * 42))
    assert site.plan(rowwise(world)) == plan
    assert plan.records == 41
    with pytest.raises(DataError, match="data do not fit this job now"):
        site.open_site(rowwise(world), world.session)
    assert "records=42 in the data: 41 are declared" in (tmp_path / "audit.jsonl").read_text()


class Judging(CausalLM):
    """A task whose rules, as the names of labels do, follow from what a coordinator wrote."""

    def encode(self, processor: Any, records: Sequence[Record], **terms: Any) -> Examples:
        for index, record in enumerate(records):
            if "w13" in record["text"]:
                fault(records, index, "text", "must not hold what the coordinator asks for")
        return super().encode(processor, records, **terms)


def test_what_a_tasks_rules_meet_does_not_tell_whether_a_job_fits(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the owner learns it, by line; a dry run belongs to the owner and stops at that line."""
    session = dataclasses.replace(world.session, task=Judging())
    rows = ["w1 w2 w3"] * 20 + ["w1 w13 w3"] + ["w1 w2 w3"] * 20
    site = opened(world, tmp_path, "text\n" + "\n".join(rows), min_records=41)
    assert site.open_site(rowwise(world), session).plan.records == 41
    assert "line=22 field='text': must not hold" in caplog.text
    assert "w13" not in caplog.text
    with pytest.raises(DataError, match="line=22 field='text'"):
        encode_records(session, rowwise(world), site.records("causal_lm"))


@pytest.mark.parametrize("row", [b"", b" ", b'"', b'"a"b', b"w1,too many", b"w1 \xff", b"w1 w2 w3"])
def test_what_one_row_holds_does_not_tell_whether_a_job_fits(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, row: bytes
) -> None:
    """The site opens with as many records, whether the row is blank, broken or like the others."""
    site = opened(world, tmp_path, "", min_records=41, delta_cap=0.5)
    lines = [b"text", *[b"w1 w2 w3"] * 20, row, *[b"w1 w2 w3"] * 20]
    (tmp_path / "data.csv").write_bytes(b"\n".join(lines))
    home = cast(Any, site.home)
    home.keys = SimpleNamespace(identity=world.identities["ash"])
    made = site.open_site(rowwise(world), world.session)
    assert made.plan.records == 41
    assert (made._job.examples.targets > 0).sum() == 40 + (row == lines[1])
    assert ("line=22" in caplog.text) == (row != lines[1])


def test_nothing_to_learn_is_told_to_the_owner_alone(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At an approved job the site opens whatever its records teach; the owner's rehearsal is refused."""
    site = opened(world, tmp_path, "text\n" + "\n".join(["w1"] * 41), min_records=41)
    made = site.open_site(rowwise(world), world.session)
    assert (made.plan.records, int((made._job.examples.targets > 0).sum())) == (41, 0)
    assert "records=41: 41 have nothing to learn from" in caplog.text
    assert "line=2, data=" in caplog.text
    with pytest.raises(DataError, match=r"41 of 41 records came to nothing; the first because .* it makes 1 token"):
        site.open_dry_run(rowwise(world), world.run.store.package, tmp_path / "rounds")


def test_a_package_whose_tokenizer_or_length_the_model_does_not_know_is_refused(world: World, tmp_path: Path) -> None:
    """A model could tell by its failure which records have the unknown token, or are long."""
    model, tokenizer, task = plain_of(world.session.model), world.session.processor, world.session.task
    vocabulary, length = model.config.vocab_size, model.config.max_position_embeddings
    known, unknown = Choosy([1]), Choosy([1])
    known.largest_id, unknown.largest_id = 49, vocabulary
    _check_fit(task, tokenizer, model, length)
    _check_fit(task, known, model, length)
    with pytest.raises(UnsupportedModel, match=rf"token id={vocabulary}: the model has rows"):
        _check_fit(task, unknown, model, length)
    learnt = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=8, n_layer=1, n_head=2))
    _check_fit(task, known, learnt, 32)
    with pytest.raises(UnsupportedModel, match="length=33: must be at most 32"):
        _check_fit(task, known, learnt, 33)


def test_an_invented_record_is_nobodys() -> None:
    found = Examples.dummy_batch(50, 16, seed=1)
    assert found.input_ids.shape == (2, 16)
    assert int(found.input_ids.max()) < 50
    assert found.attention_mask.sum(1).tolist() == [16, 8]
    assert not torch.equal(found.input_ids, Examples.dummy_batch(50, 16, seed=2).input_ids)
    assert Examples.dummy_batch(50, 2, seed=1).attention_mask.sum(1).tolist() == [2, 2]
