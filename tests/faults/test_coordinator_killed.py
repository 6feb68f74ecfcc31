"""The coordinator is killed in every step of a round; started again, it ends with the adapter of an undisturbed run."""

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import SITES, Federation, preloaded
from tests.forked import ENVIRONMENT

pytestmark = pytest.mark.slow
# For steps too short to be met from outside: (the rename at which the process dies, the step in which it ends).
MOMENTS = {
    "aggregate": "after unmask.replies 1",
    "save, before the line counts": "before state.safetensors 2",
    "save, before the attempt is closed": "after state.safetensors 2",
    "save, half of the answers": "before shares.replies 1",
    "the first state": "before state.safetensors 1",
    "the job": "before job_facts.json 1",
}


def kill_in(federation: Federation, job: Path, stage: str) -> None:
    """Starts the coordinator and kills it in a stage, as its status names it."""
    process = federation.start_coordinator(job)
    federation.wait_stage(stage, pid=process.pid)
    assert process.poll() is None, federation.log("coordinator")
    federation.kill("coordinator")


def goes_on(federation: Federation, job: Path, undisturbed: Callable[[int], bytes], before: dict[str, int]) -> None:
    federation.start_coordinator(job)
    assert federation.finish() == 0, federation.log("coordinator")
    assert federation.adapter(job) == undisturbed(1)
    spent = {site: len(federation.ledger(site)) - before[site] for site in SITES}
    assert spent == dict.fromkeys(SITES, 1)  # one release, debited once
    assert federation.status()["state"] == "finished"


def entries(federation: Federation) -> dict[str, int]:
    return {site: len(federation.ledger(site)) for site in SITES}


@pytest.mark.parametrize("stage", ["train", "keys", "masked", "unmask"])
def test_killed_while_the_sites_answer(federation: Federation, undisturbed: Callable[[int], bytes], stage: str) -> None:
    federation.forget_updates()
    job, before = federation.job(f"killed-{stage}", rounds=1), entries(federation)
    kill_in(federation, job, stage)
    goes_on(federation, job, undisturbed, before)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_one_instruction(
    federation: Federation, undisturbed: Callable[[int], bytes], moment: str, tmp_path: Path
) -> None:
    federation.forget_updates()
    job, before = federation.job(f"died-{re.sub('[^a-z]+', '-', moment)}", rounds=1), entries(federation)
    library = preloaded("die.c", tmp_path)
    federation.start_coordinator(job, env=ENVIRONMENT | {"LD_PRELOAD": library, "OFFSITE_DIE": MOMENTS[moment]})
    assert federation.finish() == -signal.SIGKILL, federation.log("coordinator")
    goes_on(federation, job, undisturbed, before)


def test_another_base_model_is_refused_and_the_right_one_goes_on(
    federation: Federation, undisturbed: Callable[[int], bytes], tmp_path: Path
) -> None:
    """Between a kill and the next start somebody puts other weights into the model's folder."""
    federation.forget_updates()
    shutil.copytree(federation.world / "model", tmp_path / "model")
    job, before = federation.job("base", rounds=1), entries(federation)
    job.write_text(job.read_text().replace(str(federation.world / "model"), str(tmp_path / "model")))
    kill_in(federation, job, "train")
    weights = tmp_path / "model" / "model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    federation.start_coordinator(job)
    assert federation.finish() == 2
    refusal = r"offsite: model=(\w{16}): run \S+ began with (\w{16}); put that model back"
    told = re.search(refusal, federation.log("coordinator"))
    assert told is not None
    assert told[1] != told[2]
    weights.write_bytes(right)
    goes_on(federation, job, undisturbed, before)
