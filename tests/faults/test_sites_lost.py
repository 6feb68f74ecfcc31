"""Sites are killed, stopped or cut off: the round goes on without them or is tried again, and they come back."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Federation, wait_for
from tests.faults.proxy import Proxy
from tests.ports import free_ports

FOUR = ("ash", "birch", "cedar", "elm")
HANGS = 240.0  # a bound against hanging, below the deadline that a round has here
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def four(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Four sites, so that a round has a sum without one of them."""
    made = Federation(tmp_path_factory.mktemp("four"), fed, sites=FOUR)
    made.start_sites()
    try:
        yield made
    finally:
        made.stop()


def rounds(federation: Federation, job: Path) -> list[dict[str, object]]:
    path = federation.run(job) / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("stage", ["train", "masked"])
def test_a_site_killed_in_a_round_is_left_out_and_comes_back(four: Federation, stage: str) -> None:
    """The site is killed in training or upload; the round closes without it, and the next round has the site again."""
    four.forget_updates()
    job = four.job(f"lost-{stage}", rounds=2, coordinator="sites = 4")
    process = four.start_coordinator(job)
    four.wait_stage(stage, pid=process.pid)
    four.kill("elm")
    wait_for(lambda: (four.run(job) / "rounds.jsonl").exists() or process.poll() is not None)
    four.start_site("elm")
    before = len(four.ledger("elm"))
    assert four.finish() == 0, four.log("coordinator")
    first, second = rounds(four, job)
    assert first["members"] == ["ash", "birch", "cedar"]
    assert [one["site"] for one in first["dropped"]] == ["elm"]  # type: ignore[attr-defined,index]
    assert set(second["members"]) >= {"ash", "birch", "cedar"}  # type: ignore[call-overload]
    rejoined = "elm" in second["members"]  # type: ignore[operator]
    assert len(four.ledger("elm")) == before + rejoined
    wait_for(lambda: four.audit("elm", "started")[-1] != four.audit("elm", "started")[0])


def test_a_round_with_too_few_is_given_up_and_tried_again(four: Federation) -> None:
    """Two of four vanish with their uploads: nothing is unmasked, the others hear of it, and the next try has a sum."""
    four.start_sites()
    four.forget_updates()
    job = four.job("too-few", rounds=1, training="spare_rounds = 1", coordinator="sites = 4")
    process = four.start_coordinator(job)
    four.wait_stage("masked", pid=process.pid)
    for site in ("cedar", "elm"):
        four.kill(site)
    wait_for(lambda: any(one["stage"] == "abort" for one in four.audit("ash", "answered")))
    four.start_sites()
    assert four.finish() == 0, four.log("coordinator")
    (line,) = rounds(four, job)
    assert set(line["members"]) >= {"ash", "birch"}  # type: ignore[call-overload]
    digest = four.status()["job"]
    spent = [entry for entry in four.ledger("ash") if entry["fields"]["job"] == digest]
    assert len(spent) in (1, 2)  # two when its first upload had left before the round was given up
    unmasked = [one for one in four.audit("ash", "answered") if one["stage"] == "unmask" and "error" not in one]
    masked = [one for one in four.audit("ash", "answered") if one["stage"] == "masked" and "error" not in one]
    assert len(masked) - len(unmasked) in (0, 1)


@pytest.mark.parametrize("who", ["ash", "coordinator"])
def test_sigterm_ends_in_the_middle_of_a_round(four: Federation, who: str) -> None:
    """The process ends by itself before the round ends, and its stored state stays usable."""
    four.start_sites()
    four.forget_updates()
    job = four.job(f"sigterm-{who}", rounds=1, coordinator="sites = 4")
    job.write_text(job.read_text().replace("deadline = 60.0", "deadline = 300.0"))
    process = four.start_coordinator(job)
    four.wait_stage("train", pid=process.pid)
    four.processes[who].send_signal(signal.SIGTERM)
    assert four.processes[who].wait(timeout=HANGS) == 143
    assert not (four.run(job) / "rounds.jsonl").exists()
    if who == "coordinator":
        assert four.status()["state"] == "stopped"
        four.start_coordinator(job)
    else:
        four.start_sites()
    assert four.finish() == 0, four.log("coordinator")


def test_a_silent_minute_is_survived(fed: Path, tmp_path: Path) -> None:
    """Everything falls silent for a minute in the middle of a round; afterwards the job goes on by itself."""
    federation, proxies = _behind_proxies(fed, tmp_path, rate=None)
    try:
        federation.start_sites()
        job = federation.job("silent", rounds=1, training="spare_rounds = 1", coordinator="attempts = 5")
        job.write_text(job.read_text().replace("patience = 60.0", "patience = 180.0"))
        process = federation.start_coordinator(job)
        federation.wait_stage("keys", pid=process.pid)
        for proxy in proxies:
            proxy.silence()
        time.sleep(60)
        for proxy in proxies:
            proxy.heal()
        assert federation.finish(300) == 0, federation.log("coordinator")
        assert len(rounds(federation, job)) == 1
    finally:
        federation.stop()
        for proxy in proxies:
            proxy.close()


def test_a_slow_link_is_not_given_up(fed: Path, tmp_path: Path) -> None:
    """50 kB/s for the package and for every message."""
    federation, proxies = _behind_proxies(fed, tmp_path, rate=50_000)
    try:
        federation.start_sites()
        job = federation.job("slow", rounds=1)
        federation.start_coordinator(job)
        assert federation.finish(300) == 0, federation.log("coordinator")
        assert proxies[1].moved > 3 * 100_000  # the package went through it, to three sites
    finally:
        federation.stop()
        for proxy in proxies:
            proxy.close()


def _behind_proxies(fed: Path, folder: Path, *, rate: float | None) -> tuple[Federation, tuple[Proxy, Proxy]]:
    ports = free_ports(2)
    proxies = Proxy(ports[0], rate=rate), Proxy(ports[1], rate=rate)
    return Federation(folder, fed, ports=ports, told=(proxies[0].port, proxies[1].port)), proxies
