"""Every mistake is a line with the next step, exit code 2, and leaves nothing half done."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offsite.cli import main as command


@pytest.fixture
def world(fed: Path, tmp_path: Path) -> Path:
    """A copy of the tiny world that a test may break."""
    shutil.copytree(fed.parent, tmp_path / "world")
    return tmp_path / "world" / "fed.toml"


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, and returns the lines of its errors, with which it must end."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["offsite", *arguments])
        with pytest.raises(SystemExit) as stopped:
            command.main()
        printed = capsys.readouterr()
        assert stopped.value.code == 2, printed.err
        assert printed.out == ""
        lines = printed.err.strip().splitlines()
        assert lines[-1].startswith("offsite: "), printed.err
        assert "Traceback" not in printed.err
        return "\n".join(line for line in lines if line.startswith("offsite: "))

    return run


def edited(world: Path, old: str, new: str) -> str:
    text = world.read_text()
    assert old in text
    world.write_text(text.replace(old, new))
    return str(world)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('path = "model"', 'path = "no-such-model"', ["no-such-model"]),
        ("[training]", '[adapter]\nmethod = "lroa"\n[training]', ["method='lroa'", "lora"]),
        ("[training]", "[privacy]\nepsilon = 0.0\n[training]", ["epsilon=0.0", "from 1e-09"]),
        ("[training]", "[privacy]\nepsilom = 3.0\n[training]", ["privacy.epsilom", "did you mean epsilon"]),
        ('owners = ["ash", "birch", "cedar", "elm"]', 'owners = ["ash", "birch"]', ["n_sites=2", "n_min=3"]),
        ('"elm"]', '"oak"]', ["oak"]),
        ("length = 16", "length = 16\ncolumn = 7", ["data.column=7"]),
        ("rounds = 2", "rounds = 0", ["training.rounds=0"]),
        ("rounds = 2", "rounds = 999\nlocal_steps = 2000", ["local_steps=1998000", "at most 1000000"]),
        ("length = 16", "length = 2000000", ["data.length=2000000", "at most 1048576"]),
        ("[aggregation]", "[aggregation]\nmomentum = 1.0", ["aggregation.momentum=1.0", "[0, 1)"]),
        ("[aggregation]", '[aggregation]\nrule = "median"', ["rule='median'", "secagg.enabled = false"]),
        ("[aggregation]", '[aggregation]\nrule = "rolora"', ["rule='rolora'", "adapter.method lora", "'ffa_lora'"]),
        ("[aggregation]", '[aggregation]\nrule = "flora"', ["rule='flora'", "flexlora"]),
        ("[evaluation]", "[evaluation]\ntolerance = nan", ["evaluation.tolerance=nan", "finite"]),
        ("[training]", "[privacy]\nepsilon = inf\n[training]", ["privacy.epsilon=inf", "to 1e+09"]),
        ("[training]", "[privacy]\nmax_grad_norm = nan\n[training]", ["privacy.max_grad_norm=nan"]),
        ("gate = 0.1", "gate = -inf", ["emulator.gate=-inf", "[-1, 1]"]),
        ("gate = 0.1", "gate = 0.9999999", ["gradient_cosine=", "below the floor"]),
        ('compress = ["int4:32"]', 'compress = ["int5"]', ["int5", "int4"]),
        ("seed = 1", "seed = [", ["not valid TOML"]),
        ("batch = 8", "batch = 4000", ["records=", "expected batch=4000"]),
        ("[training]", "[privacy]\nepsilon = 1e9\n[training]", ["epsilon=", "floor"]),
    ],
)
def test_a_wrong_setting(
    world: Path, tmp_path: Path, refused: Callable[..., str], old: str, new: str, expected: list[str]
) -> None:
    said = refused("simulate", edited(world, old, new), "--out", str(tmp_path / "out"))
    for part in expected:
        assert part in said, said


def test_a_missing_file(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "no such file" in refused("simulate", str(tmp_path / "none.toml"))


def test_fewer_sites_by_option(world: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "n_sites=2" in refused("simulate", str(world), "--sites", "2", "--out", str(tmp_path / "out"))


def test_an_unknown_engine(world: Path, refused: Callable[..., str]) -> None:
    assert "did you mean memory" in refused("simulate", str(world), "--engine", "memry")


def test_a_folder_that_is_in_use(world: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert "not empty" in refused("simulate", str(world), "--out", str(tmp_path / "out"))
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_a_folder_that_is_no_run(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "no run folder" in refused("simulate", "--resume", str(tmp_path))


def test_an_empty_shard(world: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (world.parent / "data" / "sites" / "elm" / "train" / "text.txt").write_text("")
    said = refused("simulate", str(world), "--out", str(tmp_path / "out"))
    assert "empty" in said or "no text" in said or "no record" in said, said


def test_a_wrong_data_column(world: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    place = world.parent / "data" / "public.jsonl"
    place.write_text("\n".join(json.dumps({"body": "w1 w2 w3"}) for _ in range(4)))
    said = refused(
        "simulate",
        edited(world, 'public = "data/public"', 'public = "data/public.jsonl"\ncolumn = "bodi"'),
        "--out",
        str(tmp_path / "out"),
    )
    assert "bodi" in said
    assert "body" in said


def test_nan_in_a_model_file(world: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = world.parent / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    said = refused("simulate", str(world), "--out", str(tmp_path / "out"))
    assert name in said


def test_private_text_is_in_no_message(world: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    place = world.parent / "data" / "sites" / "elm" / "train"
    shutil.rmtree(place)
    place.mkdir()
    (place / "text.jsonl").write_text('{"text": "secret w1 w2"}\n{"text": secret broken\n')
    text = edited(world, '"elm"]', '"elm"]\nreader = "jsonl"')
    assert "secret" not in refused("simulate", text, "--out", str(tmp_path / "out"))


def test_init_does_not_overwrite(world: Path, refused: Callable[..., str]) -> None:
    before = world.read_bytes()
    assert "exists" in refused("init", str(world))
    assert world.read_bytes() == before


def test_what_the_system_refuses_is_one_line(refused: Callable[..., str], world: Path) -> None:
    """A file stands where the run needs a folder."""
    (world.parent / "file").write_text("x")
    assert "file" in refused("simulate", str(world), "--out", str(world.parent / "file" / "run"))
