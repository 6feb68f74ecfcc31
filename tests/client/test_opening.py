"""A site that is opened for a job: what follows from its data is told to its owner and to nobody else."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from client.audit import Audit
from client.books import Books
from client.opening import Opened
from errors import DataError, PolicyRefusal
from privacy.ledger import Ledger
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


RECORDS = "text\n" + "\n".join(["the cat sat on the mat"] * 7)


@pytest.mark.parametrize(
    ("data", "secret", "kind"),
    [
        (RECORDS, "records=3", PolicyRefusal),
        ("Mr Smith has the flu,1950\nMs Jones is well,1960\n", "Mr Smith", DataError),
    ],
)
def test_what_a_refusal_says_of_the_data_stays_here(
    world: World, tmp_path: Path, data: str, secret: str, kind: type[Exception]
) -> None:
    site = opened(world, tmp_path, data, min_records=100)
    package = world.run.store.package
    with pytest.raises(PolicyRefusal, match=r"do not fit this job") as told:
        site.site(world.manifest, package)
    assert secret not in str(told.value)
    assert told.value.__cause__ is None
    assert secret in (tmp_path / "audit.jsonl").read_text()
    with pytest.raises(kind, match=secret):  # a dry run is its owner's own
        site.site_with(world.manifest, package, cast(Books, None), MemoryJournal(), record=tmp_path / "rounds")


def test_an_invented_record_is_nobodys() -> None:
    found = Examples.invented(50, 16)
    assert found.input_ids.shape == (2, 16)
    assert int(found.input_ids.max()) < 50
    assert found.attention_mask.sum(1).tolist() == [16, 8]
    assert Examples.invented(50, 2).attention_mask.sum(1).tolist() == [2, 2]
