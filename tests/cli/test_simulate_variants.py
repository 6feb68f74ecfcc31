"""Two emulators in one round: the adapter equals a plain sum of updates from each site's own emulator."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from offsite.cli.display import PlainDisplay
from offsite.client.training.emulator_session import EmulatorSession, open_session
from offsite.client.training.local_update import SiteJob, local_update
from offsite.client.training.privacy_plan import plan_for
from offsite.coordinator.config.federation_file import read_config
from offsite.coordinator.job.json_form import encode
from offsite.coordinator.report.model import Report
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.privacy.randomness import Randomness
from offsite.protos.job_manifest import JobManifest
from offsite.secagg import ring
from offsite.simulation.memory_engine import memory_engine
from offsite.simulation.run_folder import Run, with_options
from offsite.simulation.simulate import Options, simulate
from offsite.task.tasks import TASKS

OTHERS = ("birch", "elm")


@pytest.fixture(scope="module")
def finished(varied: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, JobManifest, Report]:
    """A run of one round under the plain mean, whose update is taken over as a whole."""
    fed = varied.with_name("mean.toml")
    text = varied.read_text().replace("[aggregation]", '[aggregation]\nrule = "mean"')
    fed.write_text(text.replace("[evaluation]", "[evaluation]\ntolerance = 100.0"))
    settings, sha256 = read_config(fed)
    settings = with_options(settings, seed=None, rounds=1, sites=None)
    run = Run.create(settings, sha256, tmp_path_factory.mktemp("runs") / "mean")
    report = simulate(run, Options(memory_engine, "memory", PlainDisplay(), "2026-01-01T00:00:00+00:00"))
    assert [record.scale for record in report.rounds] == [1.0]
    manifest = run.store.job()
    assert manifest is not None
    return run, manifest, report


def built(run: Run, folder: Path, *, recipe: tuple[str, ...], embedding: str) -> str:
    """Builds an emulator of the run's model without the job's code, and returns its digest."""
    task = TASKS["causal_lm"]
    full = task.load(run.config.model.path, dtype=torch.float32)
    examples = task.encode(
        task.load_processor(run.config.model.path),
        run.records(run.config.data.public),
        length=16,
        split="blocks",
        model_config=full.config,
    )
    public = PublicExamples(task, examples, 8)
    calibration = Calibration(public.run, public.losses)  # which these recipes do not look at
    geometry = Geometry.of(full, 1, 1, "sandwich")
    model = Path(run.config.model.path)
    return write_package(
        full, EmulatorDesign(geometry, recipe, embedding), calibration, folder, tokenizer=model
    ).digest()


def trained(run: Run, manifest: JobManifest, name: str, session: EmulatorSession) -> np.ndarray:
    """Returns the update of a site's first round on an emulator."""
    train = next(site.train for site in run.config.sites if site.name == name)
    examples = run.examples(train, manifest, session)
    start = session.layout.read(session.model).copy()
    job = SiteJob(name, manifest, session, examples, plan_for(manifest, len(examples)))
    update = local_update(job, start, randomness=Randomness.for_simulation(1, "noise", name, "1")).update
    session.put(start)
    return update


def test_the_round_is_the_mean_of_updates_from_two_emulators(
    finished: tuple[Run, JobManifest, Report], tmp_path: Path
) -> None:
    """Both emulators are built here, each site trains alone, and the sum is taken in the open."""
    run, manifest, _ = finished
    digests = [
        built(run, tmp_path / "first", recipe=("int4:32",), embedding="int8"),
        built(run, tmp_path / "other", recipe=("skip@2", "int8:32"), embedding="int4:32"),
    ]
    assert digests == [manifest.emulator_of("ash"), manifest.emulator_of("birch")]
    limits = VettingThresholds.for_owner(2 * manifest.adapter.rank, 1e6)

    @cache
    def session(other: bool) -> EmulatorSession:
        folder = tmp_path / ("other" if other else "first")
        return open_session(folder, manifest, emulator=digests[other], limits=limits, seed=1)

    names = list(manifest.sites)
    start = session(False).layout.read(session(False).model).copy()
    updates = {name: trained(run, manifest, name, session(name in OTHERS)) for name in names}
    total, clip = np.zeros(start.size, dtype=np.uint32), manifest.update_bound
    for name, update in updates.items():
        draw = Randomness.for_simulation(1, "rounding", name, "1").uniform
        total += ring.encode(update, clip=clip, members=4, randomness=draw)
    state = run.store.load_state()
    assert state is not None
    expected = (start + ring.decode(total, clip=clip, members=4, summed=4) / 4).astype(np.float32)
    np.testing.assert_array_equal(state.server.adapter, expected)
    moved, mean = state.server.adapter - start, np.mean(list(updates.values()), axis=0)
    np.testing.assert_allclose(moved, mean, atol=1e-4 * float(np.abs(mean).max()))
    # with the first emulator at every site it is another mean: the check above sees which one a site trained on
    same = np.mean([trained(run, manifest, name, session(False)) for name in names], axis=0)
    assert float(np.abs(same - mean).max()) > 1e-2 * float(np.abs(mean).max())


def test_the_report_says_who_got_which(finished: tuple[Run, JobManifest, Report]) -> None:
    run, manifest, report = finished
    emulator = report.emulators.default
    (other,) = report.emulators.variants
    assert (emulator.sites, other.sites) == (("ash", "cedar"), ("birch", "elm"))
    assert (emulator.sha256, other.sha256) == (manifest.emulator_of("ash"), manifest.emulator_of("elm"))
    assert other.package_bytes != emulator.package_bytes
    assert report.cost is not None
    assert report.cost["build"].bytes_down == 2 * (other.package_bytes + emulator.package_bytes)
    text = (run.store.folder / "report.md").read_text()
    section = text.split("## Emulators of the sites")[1].split("\n## ")[0]
    assert rows_of(section) == [("ash, cedar", manifest.emulator[:16]), ("birch, elm", other.sha256[:16])]
    written = json.loads((run.store.folder / "report.json").read_text())
    assert written["emulator"]["variants"] == [encode(other)]


def rows_of(section: str) -> list[tuple[str, str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    return [(row[0], row[-1]) for row in rows[2:]]


def test_every_member_is_in_the_sum(finished: tuple[Run, JobManifest, Report]) -> None:
    assert finished[2].secagg.members == ("ash", "birch", "cedar", "elm")
    assert finished[2].secagg.dropped == ()
