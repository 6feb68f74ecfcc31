"""Single updates over real processes: a policy that refuses, a site that cheats, a killed coordinator, and krum.

Five `client run` processes over Flower and TLS, one of them hostile; the result is compared with a slow
computation on updates that this test trains itself.
"""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from offsite.client.training.local_update import SiteJob, local_update
from offsite.client.training.privacy_plan import plan_for
from offsite.coordinator.config.federation_file import read_config
from offsite.coordinator.job.prepare import reopen
from offsite.coordinator.job.store import Store
from offsite.coordinator.rounds.attempt import Attempts
from offsite.coordinator.rounds.counter import MonotonicCounter
from offsite.coordinator.rounds.round_loop import TrainingLoop as Rounds
from offsite.privacy.randomness import Randomness
from offsite.protos.job_manifest import JobManifest
from offsite.simulation.run_folder import Run, simulated_sessions
from tests.conftest import sentence
from tests.faults.conftest import SEED, Federation, preloaded
from tests.faults.poison import poison
from tests.forked import ENVIRONMENT

SITES = ("ash", "birch", "cedar", "elm", "fir")
TABLES = """
[aggregation]
rule = "krum"
faulty = 1

[secagg]
enabled = false
n_min = 5

[privacy]
accountant = "rdp"
"""
HOSTILE, UNWILLING = "elm", "fir"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def open_fed(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world with a fifth owner and without secure aggregation."""
    folder = tmp_path_factory.mktemp("open")
    (folder / "model").symlink_to(fed.parent / "model")
    shutil.copytree(fed.parent / "data", folder / "data")
    for part, count in (("train", 1600), ("heldout", 300)):
        place = folder / "data" / "sites" / UNWILLING / part
        place.mkdir(parents=True)
        (place / "text.txt").write_text(sentence(UNWILLING + part, count))
    text = fed.read_text().replace('"elm"]', '"elm", "fir"]')
    # steps long enough for an update at the bound to change the outputs of this small model
    text = text.replace("batch = 8", "batch = 8\nlearning_rate = 1000.0")
    (folder / "fed.toml").write_text(text.replace("[aggregation]\nlearning_rate = 0.02\n", TABLES))
    return folder / "fed.toml"


@pytest.fixture(scope="module")
def federation(open_fed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """All owners but one permit that the coordinator sees their updates; one of these sites cheats."""
    made = Federation(tmp_path_factory.mktemp("seen"), open_fed, sites=SITES)
    for site in SITES:
        made.set_policy(site, allow_individual_updates=str(site != UNWILLING).lower())
        start(made, site)
    try:
        yield made
    finally:
        made.stop()


def start(federation: Federation, site: str) -> None:
    if site == HOSTILE:
        federation.start(site, str(federation.site(site)), module="tests.faults.hostile_site")
    else:
        federation.start_site(site)


def permit(federation: Federation, site: str, permitted: bool) -> None:
    """Lets an owner change the policy, and starts the client again for it."""
    federation.set_policy(site, allow_individual_updates=str(permitted).lower())
    federation.kill(site, signal.SIGTERM)
    start(federation, site)


class Slowly:
    """The expected first round of a job, from the shipped emulator and the sites' own records."""

    def __init__(self, federation: Federation, job: Path, open_fed: Path) -> None:
        config, sha256 = read_config(open_fed)
        store = Store(federation.run(job))
        self.manifest = JobManifest.from_bytes((store.folder / "job.json").read_bytes())
        self._run, self._session = (
            Run(config, sha256, store),
            simulated_sessions(Run(config, sha256, store), self.manifest),
        )
        public = self._run.records(config.data.public)
        facts = store.job_facts()
        opened = reopen(config, self.manifest, facts, records=public, store=store, on_step=lambda text: None)
        unused = Attempts(federation.folder, lambda: bytes(32), MonotonicCounter(federation.folder / "unused.txt"))
        self.rounds, self.untrained = Rounds(opened, config, store, unused), opened.zero_shot.loss
        self.start = self._session["ash"].layout.read(self._session["ash"].model)
        state = store.load_state()
        assert state is not None
        self.adapter, (self.line,) = state.server.adapter, store.rounds()

    def update(self, site: str) -> np.ndarray:
        """A site's update of the first round, float32 (d,)."""
        setting = next(one for one in self._run.config.sites if one.name == site)
        examples = self._run.examples(setting.train, self.manifest, self._session[site])
        job = SiteJob(site, self.manifest, self._session[site], examples, plan_for(self.manifest, len(examples)))
        return local_update(job, self.start, randomness=Randomness.for_simulation(SEED, "noise", site, "1")).update

    def moved(self, update: np.ndarray) -> np.ndarray:
        """The adapter after the part of a step that the coordinator took."""
        return (self.start + update.astype(np.float64) * self.line.scale).astype(np.float32)


def nearest(rows: list[np.ndarray], faulty: int) -> int:
    """Krum as in its paper, one pair after the other."""
    scores = []
    for place, row in enumerate(rows):
        far = sorted(
            sum((float(a) - float(b)) ** 2 for a, b in zip(row, other, strict=True))
            for index, other in enumerate(rows)
            if index != place
        )
        scores.append(sum(far[: len(rows) - faulty - 2]))
    return scores.index(min(scores))


def spent(federation: Federation, site: str, digest: str) -> int:
    return sum(entry["fields"].get("job") == digest for entry in federation.ledger(site))


def test_who_does_not_permit_it_is_not_in_it_and_what_is_no_update_is_left_out(
    federation: Federation, open_fed: Path, tmp_path: Path
) -> None:
    """Killed with the answers and without them, the coordinator ends with the median of the three that count."""
    (federation.site(HOSTILE) / "hostile.txt").write_text("openly nan")
    job = federation.job("median", rounds=1, coordinator="sites = 4", rule='"median"', faulty="0", n_min="3")
    library = preloaded("die.c", tmp_path)
    for moment in ("before update.replies 1", "after update.replies 1"):
        federation.start_coordinator(job, env=ENVIRONMENT | {"LD_PRELOAD": library, "OFFSITE_DIE": moment})
        assert federation.finish() == -signal.SIGKILL, federation.log("coordinator")
        plan = federation.run(job) / "attempt" / "plan.json"
        assert plan.stat().st_mode & 0o777 == 0o600
    federation.start_coordinator(job)
    assert federation.finish() == 0, federation.log("coordinator")

    slowly = Slowly(federation, job, open_fed)
    assert slowly.line.members == ("ash", "birch", "cedar")
    (left_out,) = slowly.line.dropped
    assert (left_out.site, left_out.stage) == (HOSTILE, "update")
    assert "not finite" in left_out.reason
    rows = np.stack([slowly.update(site).astype(np.float64) for site in slowly.line.members])
    expected = (slowly.start + np.median(rows * slowly.line.scale, axis=0)).astype(np.float32)
    np.testing.assert_array_equal(slowly.adapter, expected)

    digest = slowly.manifest.digest().hex()
    assert {site: spent(federation, site, digest) for site in SITES} == dict.fromkeys(SITES, 1) | {UNWILLING: 0}
    assert "allow_individual_updates=false" in federation.log(UNWILLING)
    assert "an update has left UNMASKED" in federation.log("ash")
    report = (federation.run(job) / "report.md").read_text()
    assert "Secure aggregation is OFF" in report
    assert f"| {HOSTILE} | 1 | update |" in report
    assert "secure aggregation is OFF" in federation.log("coordinator")


def test_krum_with_fewer_than_it_needs_ends_in_one_line(federation: Federation) -> None:
    job = federation.job("few", rounds=1)
    job.write_text(job.read_text().replace("patience = 60.0", "patience = 30.0"))
    federation.start_coordinator(job)
    assert federation.finish() == 2, federation.log("coordinator")
    last = federation.log("coordinator").splitlines()[-1]
    assert last.startswith("offsite: sites=4 ready, 5 are needed: ")
    assert f"needed: {UNWILLING}: PolicyRefusal" in last
    assert "allow_individual_updates=false" in federation.log(UNWILLING)


def test_krum_is_not_moved_by_a_poisoned_update_that_spoils_the_mean(federation: Federation, open_fed: Path) -> None:
    (federation.site(HOSTILE) / "hostile.txt").write_text("poisoned")
    federation.forget_updates()
    permit(federation, UNWILLING, True)
    job = federation.job("krum", rounds=1)
    federation.start_coordinator(job)
    assert federation.finish() == 0, federation.log("coordinator")
    slowly = Slowly(federation, job, open_fed)
    assert slowly.line.members == SITES
    assert slowly.line.accepted

    poisoned = poison(slowly.start.size, slowly.manifest.update_bound)
    rows = [poisoned if site == HOSTILE else slowly.update(site) for site in SITES]
    chosen = nearest(rows, faulty=1)
    assert SITES[chosen] != HOSTILE
    np.testing.assert_array_equal(slowly.adapter, slowly.moved(rows[chosen]))
    good = slowly.rounds.public_loss(slowly.adapter)
    mean = slowly.rounds.public_loss(slowly.moved(np.mean(rows, axis=0, dtype=np.float64)))
    assert good < slowly.untrained + 0.05 < slowly.untrained + 0.5 < mean
    report = json.loads((federation.run(job) / "report.json").read_text())
    assert good == pytest.approx(report["public"]["plug_in"]["loss"])
