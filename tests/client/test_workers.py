"""Two processes at one site: the update of one to a step of the ring, and what happens when one of them fails."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from offsite.client.home.installation import SiteHome
from offsite.client.home.settings import SETTINGS, SiteSettings
from offsite.client.service.doctor import FAILED, FINE, WARNED, examine
from offsite.client.service.site_runtime import SiteRuntime
from offsite.client.training.emulator_session import EmulatorSession
from offsite.client.training.local_update import SiteJob, Trained, local_update
from offsite.client.training.privacy_plan import plan_for
from offsite.client.training.worker_program import EXIT_ALONE
from offsite.client.training.workers import WorkerProcess
from offsite.errors import ConfigError, TrainingFault
from offsite.privacy.engines import ENGINES
from offsite.privacy.randomness import Randomness
from offsite.protos import codec
from offsite.protos.aggregation import AggregationTerms
from offsite.protos.job_manifest import JobManifest
from offsite.secagg import ring
from offsite.trust.toml_tables import read_settings
from tests.client.test_refresh import ALIGNED
from tests.memory_federation import NOW, RunningSite, World, make_world

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    text = fed.read_text().replace("batch = 8", "batch = 8\nlocal_steps = 3")
    path = fed.with_name("workers.toml")
    path.write_text(text.replace('compress = ["int4:32"]\ngate = 0.1\n', ALIGNED))
    return make_world(path, tmp_path_factory.mktemp("workers"))


@dataclass(frozen=True)
class Two:
    """A site whose `site.toml` says `processes = 2`, and its session on the world's package."""

    world: World
    site: RunningSite
    session: EmulatorSession

    @property
    def worker(self) -> WorkerProcess:
        (worker,) = self.session.workers._workers if self.session.workers else ()
        return worker

    @property
    def process(self) -> psutil.Process:
        assert self.worker.process is not None
        return psutil.Process(self.worker.process.pid)

    def trained(self, manifest: JobManifest, *, examples: Any = None, workers: bool = True) -> Trained:
        world, site = self.world, self.world.run.config.sites[0]
        examples = examples or world.run.examples(site.train, world.manifest, world.session)
        session = self.session if workers else dataclasses.replace(self.session, workers=None)
        job = SiteJob(site.name, manifest, session, examples, plan_for(manifest, len(examples)))
        return local_update(job, world.start, randomness=Randomness.for_simulation(1, "workers"))

    def assert_same(self, manifest: JobManifest) -> tuple[Trained, Trained]:
        """Checks that two processes and one give updates at most one step of the ring apart, and tell the same."""
        two, one = self.trained(manifest), self.trained(manifest, workers=False)
        assert np.abs(one.update).max() > 0
        assert max(two.outcome.batch_sizes) > 1
        step = 1 / ring.scale(manifest.update_bound, len(manifest.sites))
        assert np.abs(two.update.astype(np.float64) - one.update).max() <= step
        for fact in ("batch_sizes", "dropped", "event", "clipped_fraction"):
            assert getattr(two.outcome, fact) == getattr(one.outcome, fact)
        np.testing.assert_allclose(two.outcome.losses, one.outcome.losses, rtol=1e-6)
        assert two.engine == one.engine
        return two, one


@pytest.fixture(scope="module")
def two(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    site = RunningSite(world, "ash", tmp_path_factory.mktemp("ash"), package=world.run.store.package)
    runtime: Any = site.service._runtime
    runtime.home.settings = dataclasses.replace(runtime.home.settings, processes=2)
    session = SiteRuntime.open_session(runtime, world.manifest, world.run.store.package)
    site.change(open_session=lambda manifest, package: session)
    yield Two(world, site, session)
    session.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_give_the_update_of_one(two: Two, engine: str) -> None:
    two.session.engine = engine
    two.assert_same(two.world.manifest)


def test_without_privacy_as_well(two: Two) -> None:
    manifest = two.world.manifest
    two.assert_same(dataclasses.replace(manifest, privacy=dataclasses.replace(manifest.privacy, private=False)))


def test_by_forward_passes_the_update_is_the_same_bit_for_bit(two: Two) -> None:
    aggregation = AggregationTerms(directions=4, spacing=1e-3)
    found, expected = two.assert_same(dataclasses.replace(two.world.manifest, aggregation=aggregation))
    np.testing.assert_array_equal(found.update, expected.update)


def test_a_worker_has_the_biases_that_moved(two: Two) -> None:
    session, before = two.session, two.trained(two.world.manifest)
    moved = tuple(
        (name, (np.frombuffer(values, "<f2") + np.float16(0.125)).tobytes()) for name, values in session.biases.values()
    )
    session.refresh(moved)
    found, _ = two.assert_same(two.world.manifest)
    assert not np.array_equal(found.update, before.update)
    session.refresh(())
    two.assert_same(two.world.manifest)


def test_a_worker_opens_no_connection_and_holds_no_file_for_writing(two: Two) -> None:
    two.trained(two.world.manifest)
    assert two.process.net_connections(kind="inet") == []
    assert [file.path for file in two.process.open_files() if file.mode != "r"] == []
    (socket,) = two.process.net_connections(kind="unix")
    assert not socket.laddr  # no name by which anybody else could find it
    assert not socket.raddr


@dataclass(frozen=True)
class Fatal:
    """Records of which a worker's share cannot be taken without the death of the worker."""

    records: Any
    worker: psutil.Process

    def __len__(self) -> int:
        return len(self.records)

    def select(self, rows: Any) -> Any:
        self.worker.kill()
        return self.records.select(rows)


def test_a_worker_that_is_killed_ends_the_training_and_is_there_for_the_next(two: Two) -> None:
    world = two.world
    examples = world.run.examples(world.run.config.sites[0].train, world.manifest, world.session)
    with pytest.raises(TrainingFault, match="worker on device=cpu ended by itself, exit code -9"):
        two.trained(world.manifest, examples=Fatal(examples, two.process))
    two.assert_same(world.manifest)


def test_a_job_that_ends_takes_its_workers_along(two: Two) -> None:
    """The last test of this module, since it ends the worker."""
    two.site.ready()
    answer = two.site.ask("train", codec.TrainRequest(two.world.manifest.digest(), 1, two.world.start))
    assert isinstance(answer, codec.TrainReply)
    process = two.process
    two.site.ask("finish", codec.Notice("finish", "done"))
    assert not process.is_running()


STARTS = """
import signal, socket, subprocess, sys
ours, theirs = socket.socketpair()
worker = subprocess.Popen([sys.executable, "-m", sys.argv[1], str(theirs.fileno())], pass_fds=[theirs.fileno()])
theirs.close()
print(worker.pid, flush=True)
signal.pause()
"""


def test_a_worker_ends_with_the_process_that_started_it_however_that_ends() -> None:
    command = [sys.executable, "-c", STARTS, "offsite.client.training.worker_program"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert worker.wait(timeout=60) in (EXIT_ALONE, 0, None)  # nobody is left to read its code


@pytest.mark.parametrize(
    ("lines", "state", "told"),
    [
        ("", FINE, "auto, in one process"),
        (
            'device = "cpu"\nprocesses = 64',
            WARNED,
            "64 processes on cpu, .*; processes=64: PyTorch has .* threads here",
        ),
        ('device = "gpu"\nprocesses = 2', FAILED, "device='gpu': PyTorch .* finds no such device here"),
    ],
)
def test_the_line_of_doctor(tmp_path: Path, lines: str, state: str, told: str) -> None:
    (tmp_path / "records.txt").write_text("a record\n")
    made = SiteHome.create(tmp_path / "site", name="ash", data=tmp_path / "records.txt", suite=1, now=NOW)
    settings = made.folder / SETTINGS
    kept = [line for line in settings.read_text().splitlines() if not lines or line.split()[0] not in lines]
    settings.write_text("\n".join([*kept, lines]))
    (finding,) = [one for one in examine(SiteHome.open(made.folder), lambda: NOW) if one.check == "device"]
    assert finding.state == state
    assert re.search(told, finding.detail)


def test_a_number_of_processes_that_cannot_be_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SETTINGS
    path.write_text('name = "ash"\ndata = "records.txt"\nprocesses = 0\n')
    with pytest.raises(ConfigError, match=r"processes=0: must be from 1 to 64"):
        read_settings(path, SiteSettings)
