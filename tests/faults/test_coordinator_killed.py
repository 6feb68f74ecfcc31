"""The coordinator is killed in every step of a round; started again, it ends with the adapter of an undisturbed run."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import SITES, Federation, wait_for


def kill_in(federation: Federation, job: Path, stage: str) -> None:
    """Starts the coordinator and kills it in a stage, by what its files say."""
    process = federation.start_coordinator(job)
    run = federation.run(job)
    if stage == "aggregate":
        wait_for(lambda: (run / "attempt" / "unmask.replies").exists() or process.poll() is not None)
    elif stage == "save":
        wait_for(lambda: (run / "rounds.jsonl").exists() or process.poll() is not None)
    else:
        federation.wait_stage(stage, pid=process.pid)
    assert process.poll() is None, federation.log("coordinator")
    federation.kill("coordinator")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "keys", "masked", "unmask", "aggregate", "save"])
def test_goes_on_to_the_same_adapter(federation: Federation, undisturbed: Callable[[int], bytes], stage: str) -> None:
    federation.forget_updates()
    job = federation.job(f"killed-{stage}", rounds=1)
    before = {site: len(federation.ledger(site)) for site in SITES}
    kill_in(federation, job, stage)
    again: subprocess.Popen[bytes] = federation.start_coordinator(job)
    assert federation.finish() == 0, federation.log("coordinator")
    assert again.returncode == 0
    assert federation.adapter(job) == undisturbed(1)
    spent = {site: len(federation.ledger(site)) - before[site] for site in SITES}
    assert spent == dict.fromkeys(SITES, 1)  # one release, debited once
    assert federation.status()["state"] == "finished"
