"""A site that is opened for a job: what follows from its data is told to its owner and to nobody else."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from client.audit import Audit
from client.books import Books
from client.opening import Opened
from client.workbench import _check_ids
from errors import DataError, PolicyRefusal, UnsupportedModel
from privacy.ledger import Ledger
from protos.manifest import JobManifest
from secagg.journal import MemoryJournal
from task.examples import Examples
from tests.memory_federation import NOW, World, make_world, policy_for


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(fed, tmp_path_factory.mktemp("opening"))


def opened(world: World, folder: Path, data: str, **policy: Any) -> Opened:
    """An installation with one data file."""
    (folder / "data.csv").write_text(data)
    settings = SimpleNamespace(reader="", column="text", name="ash", simulation_seed=None)
    installation = SimpleNamespace(settings=settings, data=folder / "data.csv", state=folder)
    rules = policy_for(folder, **policy)
    ledger = Ledger(folder / "ledger.jsonl", dataset="main", epsilon_cap=9.0, delta=1e-2, accountant="rdp")
    audit = Audit(folder / "audit.jsonl")
    return Opened(cast(Any, installation), rules, audit, ledger, cast(Any, None), lambda: NOW)


RECORDS = "text\n" + "\n".join(["w1 w2 w3 w4 w5 w6"] * 7)


@pytest.mark.parametrize(
    ("data", "secret", "kind", "told_kind"),
    [
        (RECORDS, "records=7", PolicyRefusal, PolicyRefusal),
        ("Mr Smith has the flu,1950\nMs Jones is well,1960\n", "Mr Smith", DataError, DataError),
    ],
)
def test_what_a_refusal_says_of_the_data_stays_here(
    world: World, tmp_path: Path, data: str, secret: str, kind: type[Exception], told_kind: type[Exception]
) -> None:
    site = opened(world, tmp_path, data, min_records=100)
    with pytest.raises(told_kind, match=r"its owner sees why in the site's log") as told:
        site.site(rowwise(world), world.bench)
    assert type(told.value) is told_kind
    assert secret not in str(told.value)
    assert told.value.__cause__ is None
    assert secret in (tmp_path / "audit.jsonl").read_text()
    package, books = world.run.store.package, cast(Books, None)
    with pytest.raises(kind, match=secret):  # a dry run is its owner's own
        site.site_with(rowwise(world), package, books, MemoryJournal(), record=tmp_path / "rounds")


def rowwise(world: World) -> JobManifest:
    """The job with one record of each text."""
    return dataclasses.replace(world.manifest, split="truncate")


class Choosy:
    """A tokenizer that a coordinator made to learn who has what: it empties such texts, fails on them, or panics."""

    eos_token_id = 0

    def __init__(self, does: Any) -> None:
        self.does = does

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.does() if "w13" in text else [1, 2, 3]}


def failing() -> list[int]:
    raise ValueError("w13")


@pytest.mark.parametrize("does", [list, lambda: [10**6, 1], failing])
def test_what_a_tokenizer_meets_does_not_tell_whether_a_job_fits(world: World, tmp_path: Path, does: Any) -> None:
    """Two owners, one of whom has the word in every record: both sites open, with as many records."""
    bench = dataclasses.replace(world.bench, tokenizer=Choosy(does))
    plans = []
    for word in ("w12", "w13"):
        (tmp_path / word).mkdir()
        data = "text\n" + "\n".join([f"w1 {word} w3"] * 40)
        site = opened(world, tmp_path / word, data, min_records=40, delta_cap=0.5)
        installation = cast(Any, site.installation)
        installation.keys = SimpleNamespace(identity=world.identities["ash"])
        plans.append(site.site(rowwise(world), bench).plan)
    assert plans[0] == plans[1]
    assert plans[0].records == 40


def test_a_model_that_does_not_know_its_tokens_is_refused(world: World) -> None:
    tokenizer = world.bench.tokenizer
    _check_ids(tokenizer, len(tokenizer))
    with pytest.raises(UnsupportedModel, match=rf"token id={len(tokenizer) - 1}: the emulator knows"):
        _check_ids(tokenizer, len(tokenizer) - 1)


def test_an_invented_record_is_nobodys() -> None:
    found = Examples.invented(50, 16)
    assert found.input_ids.shape == (2, 16)
    assert int(found.input_ids.max()) < 50
    assert found.attention_mask.sum(1).tolist() == [16, 8]
    assert Examples.invented(50, 2).attention_mask.sum(1).tolist() == [2, 2]
