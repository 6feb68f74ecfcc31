"""The disk is full at a site or the coordinator: nothing is torn, nothing leaves unaccounted, the job goes on later.

A limit on the running process makes the operating system refuse every larger write, as on a full disk.
"""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import Federation, wait_for
from tests.forked import offsite

FOUR = ("ash", "birch", "cedar", "elm")
pytestmark = pytest.mark.slow


@contextmanager
def full(pid: int, size: int = 1) -> Iterator[None]:
    """Lets a process write no file beyond so many bytes."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        if psutil.pid_exists(pid):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def four(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = Federation(tmp_path_factory.mktemp("full"), fed, sites=FOUR)
    made.start_sites()
    try:
        yield made
    finally:
        made.stop()


def test_a_site_without_room_for_the_package_says_so_and_takes_it_later(four: Federation) -> None:
    """The site can write its logs, and no file as large as the package."""
    pid = four.processes["elm"].pid
    with full(pid, 60_000):
        process = four.start_coordinator(job := four.job("package", rounds=1, coordinator="sites = 4"))
        wait_for(lambda: "DataError" in four.status()["sites"].get("elm", {}).get("detail", ""))
        assert any("free disk space" in line["reason"] for line in four.audit("elm", "refused"))
        assert process.poll() is None
    assert four.finish() == 0, four.log("coordinator")
    (line,) = rounds(four, job)
    assert line["members"] == list(FOUR)


def rounds(federation: Federation, job: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (federation.run(job) / "rounds.jsonl").read_text().splitlines()]


def test_a_site_that_cannot_write_its_books_sends_nothing(four: Federation) -> None:
    four.forget_updates()
    job = four.job("accounts", rounds=2, coordinator="sites = 4")
    process = four.start_coordinator(job)
    before = len(four.ledger("elm")), len(four.audit("elm", "egress"))
    four.wait_stage("train", pid=process.pid)
    with full(four.processes["elm"].pid):
        wait_for((four.run(job) / "rounds.jsonl").exists)
        assert (len(four.ledger("elm")), len(four.audit("elm", "egress"))) == before
    assert four.finish() == 0, four.log("coordinator")
    first, second = rounds(four, job)
    assert first["members"] == ["ash", "birch", "cedar"]
    assert [one["site"] for one in first["dropped"]] == ["elm"]  # type: ignore[attr-defined,index]
    assert "DataError: this site cannot read or write its files" in str(first["dropped"])
    assert second["members"] == list(FOUR)
    assert four.processes["elm"].poll() is None
    assert "chain whole" in offsite("client", "audit", "verify", str(four.site("elm")))
    assert len(four.ledger("elm")) == before[0] + 1


def test_a_coordinator_that_cannot_write_stops_and_goes_on_later(four: Federation) -> None:
    four.forget_updates()
    job = four.job("coordinator", rounds=1, coordinator="sites = 4")
    process = four.start_coordinator(job)
    four.wait_stage("train", pid=process.pid)
    spent = {site: len(four.ledger(site)) for site in FOUR}
    with full(process.pid):
        assert four.finish() == 2
    shown = json.loads(offsite("coordinator", "status", str(four.home), "--json"))
    assert shown["state"] in ("killed", "stopped")
    assert "run the same command again" in shown["next"]
    assert {path.suffix for path in four.run(job).iterdir() if path.is_file()} <= {".json", ".safetensors", ".jsonl"}
    four.start_coordinator(job)
    assert four.finish() == 0, four.log("coordinator")
    (line,) = rounds(four, job)
    assert line["members"] == list(FOUR)
    assert {site: len(four.ledger(site)) - spent[site] for site in FOUR} == dict.fromkeys(FOUR, 1)


def test_a_full_disk_under_flowers_superlink_is_survived(four: Federation) -> None:
    """The SuperLink then answers with errors, at which the sites' SuperNodes end; everything starts again by itself."""
    four.forget_updates()
    job = four.job("superlink", rounds=1, training="spare_rounds = 2", coordinator="sites = 4\nattempts = 5")
    process = four.start_coordinator(job)
    four.wait_stage("train", pid=process.pid)
    (link,) = [
        one
        for one in psutil.Process(process.pid).children()
        if "offsite.coordinator.network.superlink" in one.cmdline()
    ]
    with full(link.pid):
        wait_for(lambda: four.status()["state"] in ("link lost", "waiting for sites", "building"))
    assert four.finish() == 0, four.log("coordinator")
    assert len(rounds(four, job)) == 1
