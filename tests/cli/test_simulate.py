"""The main job on a tiny model: every engine, a plain loop, an interruption, and the content of the run folder."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.cli.display import PlainDisplay
from offsite.client.site.round_handler import answer
from offsite.client.training.local_update import SiteJob, local_update
from offsite.coordinator.aggregation.rules import AGGREGATORS, RuleSettings, ServerState
from offsite.coordinator.config.federation_file import read_config
from offsite.coordinator.job.round_record import RoundRecord
from offsite.coordinator.report.model import Report
from offsite.coordinator.rounds.exchange import MemoryExchange
from offsite.emulator.runtime.plug_in import plug
from offsite.privacy.randomness import Randomness
from offsite.secagg import ring
from offsite.simulation.memory_engine import memory_engine
from offsite.simulation.run_folder import CONFIG, FILES, FOLDERS, Run, simulated_sessions, with_options
from offsite.simulation.simulate import Options, simulate
from offsite.task.tasks import TASKS

pytestmark = pytest.mark.slow  # a simulation for almost each test; tests/cli/test_golden.py has the quick one
KEYS = {
    "quality": {"full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in", "private", "public"},
    "emulator": {"shipped_bytes", "full_bytes", "middle_ratio", "gradient_cosine"},
    "secagg": {"members", "threshold", "dropped", "upload_bytes", "payload_bytes"},
    "cost": {"build", "train", "evaluate", "total"},
    "provenance": {"seed", "config_sha256", "model_sha256", "versions"},
}
SITE_KEYS = {"epsilon", "delta", "noise_multiplier", "max_grad_norm", "sample_rate", "steps"}


def open_run(fed: Path, out: Path, **options: Any) -> Run:
    settings, sha256 = read_config(fed)
    return Run.create(with_options(settings, **({"seed": None, "rounds": None, "sites": None} | options)), sha256, out)


def options(display: Any = None, engine: Any = memory_engine) -> Options:
    return Options(engine, "memory", display or PlainDisplay(), "2026-01-01T00:00:00+00:00")


def offsite(*arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "offsite.cli.main", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def finished(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Report]:
    run = open_run(fed, tmp_path_factory.mktemp("runs") / "finished")
    return run, simulate(run, options())


def weights(run: Run) -> bytes:
    return (run.store.adapter / "adapter_model.safetensors").read_bytes()


def test_the_run_folder_holds_what_the_readme_says(finished: tuple[Run, Report]) -> None:
    run, report = finished
    for name in ("report.json", "report.md", "report.html", "privacy.json", "rounds.jsonl", "package/manifest.json"):
        assert (run.store.folder / name).stat().st_size > 0, name
    written = json.loads((run.store.folder / "report.json").read_text())
    for section, keys in KEYS.items():
        assert keys <= set(written[section]), section
    for site in written["privacy"]["sites"]:
        assert set(site) >= SITE_KEYS
        assert site["epsilon_by"] in ("pld", "rdp")
        assert site["epsilon"] <= 8.0
        assert site["steps"] == report.finished_rounds == 2
    assert written["finished_rounds"] == len(written["rounds"])
    # A folder that is taken over is cleared of these names.
    assert {path.name for path in run.store.folder.iterdir()} <= {CONFIG, *FILES, *FOLDERS}


def test_epsilon_is_of_all_rounds_together(finished: tuple[Run, Report]) -> None:
    for site in finished[1].privacy.sites:
        assert site.epsilon_by_round is not None
        assert list(site.epsilon_by_round) == sorted(site.epsilon_by_round)
        assert site.epsilon == site.epsilon_by_round[-1] > 1.01 * site.epsilon_by_round[0]
        assert 7.9 < site.epsilon <= 8.0  # calibrated for the whole job, not with room to spare


def test_peft_loads_the_adapter_with_the_plug_ins_logits(finished: tuple[Run, Report]) -> None:
    run, _ = finished
    task, manifest, state = TASKS["causal_lm"], run.store.job(), run.store.load_state()
    assert manifest is not None
    assert state is not None
    ids = torch.arange(3, 43).reshape(2, 20)
    plugged = attach(task.load(run.config.model.path, dtype=torch.float32), manifest.adapter)
    plug(plugged, Layout.of(plugged), state.server.adapter)
    loaded = PeftModel.from_pretrained(task.load(run.config.model.path, dtype=torch.float32), str(run.store.adapter))
    plain = task.load(run.config.model.path, dtype=torch.float32)
    with torch.no_grad():
        mine, theirs, before = (model(input_ids=ids).logits for model in (plugged, loaded, plain))
    assert float((mine - theirs).abs().max()) == 0.0
    assert float((mine - before).abs().max()) > 0.0


def test_a_plain_loop_gives_the_same_adapter(finished: tuple[Run, Report]) -> None:
    """Trains the sites one by one, adds their integers in the open, and applies Adam written out by hand."""
    run, _ = finished
    manifest, state = run.store.job(), run.store.load_state()
    assert manifest is not None
    assert state is not None
    session = simulated_sessions(run, manifest)["ash"]
    names = list(manifest.sites)
    adapter = session.layout.read(session.model)
    first = second = np.zeros(adapter.size)
    for number in range(1, manifest.rounds + 1):
        total = np.zeros(adapter.size, dtype=np.uint32)
        for name in names:
            site = run.site(name, manifest, session)
            examples = run.examples(next(s.train for s in run.config.sites if s.name == name), manifest, session)
            noise = Randomness.for_simulation(1, "noise", name, str(number))
            trained = local_update(SiteJob(name, manifest, session, examples, site.plan), adapter, randomness=noise)
            draw = Randomness.for_simulation(1, "rounding", name, str(number)).uniform
            total += ring.encode(trained.update, clip=manifest.update_bound, members=4, randomness=draw)
        mean = ring.decode(total, clip=manifest.update_bound, members=4, summed=4) / 4
        first, second = 0.9 * first + (1 - 0.9) * mean, 0.999 * second + (1 - 0.999) * np.square(mean)
        step = first / (1 - 0.9**number) / (np.sqrt(second / (1 - 0.999**number)) + 1e-12)
        adapter = (adapter + 0.02 * step).astype(np.float32)
    np.testing.assert_array_equal(adapter, state.server.adapter)


class StopAfter(PlainDisplay):
    """Presses Ctrl-C once a round is stored."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def round(self, record: RoundRecord, planned: int) -> None:
        if record.round == self._number:
            raise KeyboardInterrupt


def test_a_stopped_run_goes_on_to_the_identical_adapter(
    fed: Path, tmp_path: Path, finished: tuple[Run, Report]
) -> None:
    run = open_run(fed, tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        simulate(run, options(StopAfter(1)))
    assert len(run.store.rounds()) == 1
    again = Run.open(tmp_path / "stopped")
    report = simulate(again, options())
    assert weights(again) == weights(finished[0])
    assert report.finished_rounds == 2
    assert [site.steps for site in report.privacy.sites] == [2] * 4


def test_a_round_that_was_cut_off_while_it_was_written_does_not_count(
    fed: Path, tmp_path: Path, finished: tuple[Run, Report]
) -> None:
    run = open_run(fed, tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        simulate(run, options(StopAfter(1)))
    with (run.store.folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 2, "members": [], "seco')
    again = Run.open(tmp_path / "cut")
    simulate(again, options())
    assert weights(again) == weights(finished[0])
    assert [record.round for record in again.store.rounds()] == [1, 2]


def test_another_seed_gives_another_adapter(fed: Path, tmp_path: Path, finished: tuple[Run, Report]) -> None:
    run = open_run(fed, tmp_path / "other", seed=2, rounds=1)
    simulate(run, options())
    assert weights(run) != weights(finished[0])


def test_a_worse_adapter_is_not_taken_over(fed: Path, tmp_path: Path) -> None:
    """A server step of 1000 wrecks the model; the round must be refused, and the adapter must stay as it was."""
    wild = fed.parent / "wild.toml"
    wild.write_text(fed.read_text().replace("learning_rate = 0.02", "learning_rate = 1000.0"))
    run = open_run(wild, tmp_path / "wild", rounds=1)
    report = simulate(run, options())
    assert [record.accepted for record in report.rounds] == [False]
    assert report.quality.gain_nats == 0.0
    assert any("not taken over" in warning for warning in report.warnings)


def test_a_site_that_drops_out_is_left_out_of_the_sum(fed: Path, tmp_path: Path) -> None:
    """One of four sites fails after training; the sum must equal a plain sum of the other three updates."""

    def one_falls_silent(run: Run, manifest: Any, sessions: Any, display: Any, rounds: Any) -> Any:
        sites = {name: run.site(name, manifest, sessions[name]) for name, _ in manifest.roster}
        calls = {name: partial(answer, site) for name, site in sites.items()}

        def silent(stage: str, body: bytes) -> bytes:
            return b"" if stage == "masked" else answer(sites["elm"], stage, body)

        return rounds(MemoryExchange(calls | {"elm": silent}))

    run = open_run(fed, tmp_path / "silent", rounds=1)
    report = simulate(run, options(engine=one_falls_silent))
    assert report.secagg.members == ("ash", "birch", "cedar")
    assert [(one.site, one.stage) for one in report.secagg.dropped] == [("elm", "masked")]
    manifest, state = run.store.job(), run.store.load_state()
    assert manifest is not None
    assert state is not None
    session = simulated_sessions(run, manifest)["ash"]
    start = session.layout.read(session.model)
    total = np.zeros(start.size, dtype=np.uint32)
    for name in ("ash", "birch", "cedar"):
        setting = next(s for s in run.config.sites if s.name == name)
        plan = run.site(name, manifest, session).plan
        noise = Randomness.for_simulation(1, "noise", name, "1")
        examples = run.examples(setting.train, manifest, session)
        trained = local_update(SiteJob(name, manifest, session, examples, plan), start, randomness=noise)
        draw = Randomness.for_simulation(1, "rounding", name, "1").uniform
        total += ring.encode(trained.update, clip=manifest.update_bound, members=4, randomness=draw)
    mean = ring.decode(total, clip=manifest.update_bound, members=4, summed=3) / 3
    expected = AGGREGATORS["fedadam"].step(ServerState.start(start), mean, RuleSettings(0.02, 0.9)).adapter
    np.testing.assert_array_equal(state.server.adapter, expected)


def test_without_privacy_the_report_says_so_first(fed: Path, tmp_path: Path) -> None:
    process = offsite("simulate", str(fed), "--no-privacy", "--rounds", "1", "--json", "--out", str(tmp_path / "open"))
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    report = json.loads(printed)
    assert report["privacy"]["private"] is False
    assert all(site["epsilon"] is None for site in report["privacy"]["sites"])
    assert "privacy is off" in report["warnings"][0]


def test_ctrl_c_leaves_a_run_that_resumes_to_the_identical_adapter(
    fed: Path, tmp_path: Path, finished: tuple[Run, Report]
) -> None:
    """The process and the signal are real, and the signal arrives at any moment after the first round."""
    out = tmp_path / "killed"
    process = offsite("simulate", str(fed), "--out", str(out))
    until = time.monotonic() + 240
    while not (out / "rounds.jsonl").exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    if process.returncode != 0:  # 0 when the run ended before the signal came
        assert process.returncode == 130, said
        assert f"--resume {out}" in said
    process = offsite("simulate", "--resume", str(out))
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert weights(Run.open(out)) == weights(finished[0])


def test_flowers_simulation_gives_the_same_adapter(fed: Path, tmp_path: Path, finished: tuple[Run, Report]) -> None:
    pytest.importorskip("ray", reason="the extra `simulation` is not installed")
    out = tmp_path / "flower"
    process = offsite("simulate", str(fed), "--engine", "flower", "--out", str(out))
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said[-3000:]
    assert weights(Run.open(out)) == weights(finished[0])
