"""The run folder after a mistake: taken over by the same command until a round is whole, and by no other content."""

import json
from pathlib import Path

import numpy as np
import pytest

import offsite
from offsite.cli import main as command
from offsite.coordinator.aggregation.rules import ServerState
from offsite.coordinator.config.federation_file import read_config
from offsite.coordinator.home.job_settings import keep_place, run_folder
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.coordinator.job.store import Progress, Store
from offsite.errors import CheckFailed, ConfigError
from offsite.simulation.begin import begin, resume
from offsite.simulation.run_folder import CONFIG, FILES, FOLDERS, Origin, Run, check_free
from offsite.trust.files import alone, sha256_file


def silent(line: str) -> None:
    """Takes a warning that no test of this file looks at."""


@pytest.fixture
def mine(fed: Path, tmp_path: Path) -> Path:
    """A federation file of the tiny world that a test may change."""
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(fed.parent / name)
    (tmp_path / "fed.toml").write_text(fed.read_text())
    return tmp_path / "fed.toml"


def made(file: Path, folder: Path) -> Run:
    """Makes a run folder without the check, which `tests/cli/test_check.py` covers."""
    config, sha256 = read_config(file)
    return Run.create(config, sha256, folder, Origin(file=str(file)))


def whole(folder: Path, rounds: int) -> None:
    """Leaves a folder as a run does after so many whole rounds."""
    Store(folder).save_state(Progress(ServerState.start(np.zeros(3, dtype=np.float32)), rounds, 1.0))


def test_a_run_without_a_whole_round_is_taken_over(mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = made(mine, out).roster()
    for name in FILES:
        (out / name).write_text("old")
    for name in FOLDERS:
        (out / name).mkdir(exist_ok=True)
        (out / name / "old").write_text("old")
    (out / "state.safetensors").unlink()
    (out / "mine.txt").write_text("keep")
    whole(out, 0)
    mine.write_text(mine.read_text().replace("gate = 0.1", "gate = 0.2"))
    run = made(mine, out)
    assert run.roster() != first  # the sites have new keys
    assert Run.open(out).config.emulator.gate == 0.2
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert left == {CONFIG, "mine.txt", *(f"sites/{name}/identity.key" for name, _ in run.roster())}
    assert (out / "mine.txt").read_text() == "keep"


def test_a_whole_round_is_never_taken_over(mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    made(mine, out)
    whole(out, 2)
    before = (out / "state.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"its run has 2 whole rounds; choose another folder, or --resume"):
        made(mine, out)
    assert (out / "state.safetensors").read_bytes() == before


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "[]", "{broken", ""], ids=str)
def test_a_folder_of_something_else_is_never_taken_over(tmp_path: Path, content: str) -> None:
    """A model's folder has a `config.json` too."""
    (tmp_path / CONFIG).write_text(content)
    (tmp_path / "model.safetensors").write_text("weights")
    with pytest.raises(ConfigError, match="the folder is not empty, and holds no run"):
        check_free(tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "weights"


def test_a_folder_in_which_a_simulation_runs_is_never_taken_over(mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    made(mine, out)
    before = (out / CONFIG).read_bytes()
    with alone(out, "a simulation"), pytest.raises(ConfigError, match="a simulation runs here already"):
        made(mine, out)
    assert (out / CONFIG).read_bytes() == before


def test_a_mistake_leaves_no_folder_and_the_mended_file_runs_in_it(mine: Path, tmp_path: Path) -> None:
    out, good = tmp_path / "run", mine.read_text()
    mine.write_text(good.replace('public = "data/public"', 'public = "data/publik"'))
    with pytest.raises(CheckFailed, match=r"^data='.*publik' does not exist"):
        begin(mine, out, Origin(rounds=1), silent)
    assert not out.exists()
    mine.write_text(good)
    with pytest.raises(CheckFailed, match=r"device='cuda:7': PyTorch .* finds no such device here"):
        begin(mine, out, Origin(rounds=1), silent, device="cuda:7")
    with pytest.raises(CheckFailed, match=r"device='cuda:7': PyTorch .* finds no such device here"):
        offsite.simulate(mine, out, device="cuda:7")
    assert not out.exists()
    mine.write_text(f'{good}\n[compute]\ndevice = "cuda:7"\n')
    assert begin(mine, out, Origin(rounds=1), silent, device="cpu").config.compute.device == "cpu"
    mine.write_text(good)
    run = begin(mine, out, Origin(rounds=1), silent)
    assert run.config.training.rounds == 1
    kept = json.loads((out / CONFIG).read_text())
    assert kept["sha256"] == sha256_file(mine)
    assert kept["origin"] == {"file": str(mine.resolve()), "seed": None, "rounds": 1, "sites": None, "private": True}
    # whatever stopped this run later, for example a gate, is mended in the file
    mine.write_text(good.replace("gate = 0.1", "gate = 0.05"))
    again = resume(out, silent)
    assert again.config.emulator.gate == 0.05
    assert again.config.training.rounds == 1  # the options of the command stay
    whole(out, 1)
    mine.write_text(good.replace("gate = 0.1", "gate = 0.07"))
    assert resume(out, silent).config.emulator.gate == 0.05  # a run with whole rounds keeps what its sites trained with


def test_an_unknown_key_on_resume_names_the_file_that_holds_it(mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    made(mine, out)
    kept = json.loads((out / CONFIG).read_text())
    kept["config"]["training"]["rouns"] = 3
    (out / CONFIG).write_text(json.dumps(kept))
    with pytest.raises(
        ConfigError, match=r"^config='.*run/config\.json' key training\.rouns is not known; did you mean"
    ):
        Run.open(out)


def test_a_run_folder_of_the_release_before_is_opened(mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    made(mine, out)
    kept = json.loads((out / CONFIG).read_text())
    del kept["origin"]
    (out / CONFIG).write_text(json.dumps(kept))
    assert Run.open(out).origin == Origin()
    check_free(out)


# a job between organisations


def home_of(tmp_path: Path) -> CoordinatorHome:
    (tmp_path / "home").mkdir(exist_ok=True)
    home = object.__new__(CoordinatorHome)  # only its folder of runs counts here
    home.folder, home.runs = tmp_path / "home", tmp_path / "home" / "runs"
    home.runs.mkdir(exist_ok=True)
    return home


def test_the_same_file_without_out_finds_the_open_job(mine: Path, tmp_path: Path) -> None:
    mine.write_text(mine.read_text() + '\n[coordinator]\nhome = "home"\n')
    config, home, elsewhere = read_config(mine)[0], home_of(tmp_path), tmp_path / "elsewhere"
    own = run_folder(home, config, None)
    assert own.parent == home.runs
    assert run_folder(home, config, elsewhere) == elsewhere
    keep_place(home, config, elsewhere)
    assert run_folder(home, config, None) == own  # no job was prepared there
    elsewhere.mkdir()
    (elsewhere / "job.json").write_text("{}")
    assert run_folder(home, config, None) == elsewhere
    mine.write_text(mine.read_text().replace("rounds = 2", "rounds = 3"))
    assert run_folder(home, read_config(mine)[0], None).parent == home.runs  # other settings are another job
    keep_place(home, config, own)
    assert run_folder(home, config, None) == own


def test_the_command_that_goes_on_is_the_command_that_was_stopped(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from offsite.simulation import simulate

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "simulate", stop)
    out = tmp_path / "with space"
    monkeypatch.setattr("sys.argv", ["offsite", "simulate", str(mine), "--out", str(out), "--json"])
    with pytest.raises(SystemExit):
        command.main()
    assert f"go on with: offsite simulate --resume '{out}' --json" in capsys.readouterr().err
