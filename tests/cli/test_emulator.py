"""`offsite emulator`: build within limits, inspect, compare, vet; a refusal leaves nothing behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offsite.cli import main as command
from offsite.emulator.package.package_reader import load, read_manifest
from tests.conftest import sentence

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(fed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["offsite", "emulator", *arguments])
        with pytest.raises(SystemExit) as stopped:
            command.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return call


@pytest.fixture
def build(fed: Path, run: Run, tmp_path: Path) -> Run:
    fixed = ("--calibration", str(fed.parent / "data" / "public"), "--out", str(tmp_path / "p"), "--first", "1")
    small = ("--last", "1", "--length", "16", "--sequences", "24", "--gate", "0.05", "--rank", "2")
    return lambda *more: run("build", str(fed.parent / "model"), *fixed, *small, *more)


def test_a_recipe_is_built_and_reported(build: Run, tmp_path: Path) -> None:
    code, out, err = build("--recipe", "narrow:0.5 gptq4:16")
    assert code == 0, err
    assert "recipe: narrow:0.5 gptq4:16; word tables int8" in out
    assert "gradient cosine: " in out
    manifest = read_manifest(tmp_path / "p")
    report = json.loads((tmp_path / "p.report.json").read_text())
    assert report["emulator"] == manifest.digest()
    assert report["compute_ratio"] == manifest.compute_ratio < 0.8
    assert len(report["similarity"]) == 6
    assert report["rehearsal"] is None
    assert (tmp_path / "p" / "tokenizer.json").is_file()
    assert torch.isfinite(load(tmp_path / "p")(input_ids=torch.tensor([[3, 4, 5]])).logits).all()


@pytest.mark.parametrize("shape", ["sandwich", "parallel", "auto"])
def test_limits_are_searched_for_and_kept(build: Run, tmp_path: Path, shape: str) -> None:
    flops = ("--max-flops", "0.7") if shape == "sandwich" else ()
    code, out, err = build("--shape", shape, "--max-bytes", "105KB", *flops)
    assert code == 0, err
    manifest = read_manifest(tmp_path / "p")
    assert manifest.shipped_bytes < 105_000 + (1 << 16)
    assert manifest.slot_bytes + manifest.middle_bytes + manifest.embedding_bytes + manifest.other_bytes <= 105_000
    assert "candidates:" in out
    candidates = json.loads((tmp_path / "p.report.json").read_text())["candidates"]
    assert len(candidates) >= 5
    assert any(one["fits"] for one in candidates)
    assert shape in ("auto", manifest.geometry.shape)
    if shape == "sandwich":
        assert manifest.compute_ratio <= 0.7


@pytest.fixture
def other(tmp_path: Path) -> tuple[str, str]:
    """Text of another kind than the model was trained on: an adapter can gain on it."""
    (tmp_path / "other.txt").write_text(sentence("other", 16 * 300))
    return "--calibration", str(tmp_path / "other.txt")


def test_a_rehearsal_measures_transfer_and_leak(build: Run, other: tuple[str, str], tmp_path: Path) -> None:
    code, out, err = build("--recipe", "gptq8:16", "--rehearse", "--relearn", "100,400", *other)
    assert code == 0, err
    assert "rehearsal on public records: transfer" in out
    found = json.loads((tmp_path / "p.report.json").read_text())["rehearsal"]
    assert found["transfer"] == pytest.approx(1, abs=0.6)  # eight bits are as good as the model; the gain is small
    assert found["leak"] == pytest.approx(1, abs=0.6)
    assert set(found["relearned_leak"]) == {"100", "400"}


def test_what_gives_too_much_away_is_not_shipped(build: Run, other: tuple[str, str], tmp_path: Path) -> None:
    code, out, err = build("--recipe", "gptq8:16", "--max-leak", "0.2", "--relearn", "100", *other)
    assert (code, out) == (2, "")
    assert "offsite: max_leak=0.2: this emulator gives away" in err
    assert not (tmp_path / "p").exists()


def test_what_fails_the_gate_is_not_shipped(build: Run, tmp_path: Path) -> None:
    code, _, err = build("--recipe", "skip@1-4", "--gate", "0.999")
    assert code == 2
    assert "below the floor 0.999" in err.splitlines()[-1]
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--max-bytes", "lots"), "max_bytes='lots' is not a size; write 80MB"),
        (("--max-bytes", "1KB"), "max_bytes: the smallest emulator has"),
        (("--max-flops", "1.5"), "max_flops=1.5: it is a share"),
        (("--recipe", "gptq5:16"), "compressor='gptq5' is not known"),
        (("--shape", "round", "--recipe", "int8"), "shape='round' is neither"),
        (("--relearn", "many", "--recipe", "int8"), "relearn='many' is not a number of tokens"),
        (("--sequences", "100000"), "100032 are needed"),
    ],
)
def test_bad_input_is_one_line(build: Run, tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    code, out, err = build(*arguments)
    assert (code, out) == (2, "")
    assert expected in err.splitlines()[-1], err
    assert "Traceback" not in err
    assert not (tmp_path / "p").exists() or not any((tmp_path / "p").iterdir())


def test_inspect_compare_and_vet(build: Run, run: Run, tmp_path: Path) -> None:
    assert build("--recipe", "int8:16")[0] == 0
    code, out, _ = run("inspect", str(tmp_path / "p"))
    assert code == 0
    assert "recipe: int8:16" in out
    code, out, _ = run("compare", str(tmp_path / "p"), str(tmp_path / "p"))
    assert code == 0
    assert out.count("int8:16") == 2
    code, out, err = run("vet", str(tmp_path / "p"), "--seed", "1")
    assert code == 0, err
    assert "no known trap in" in out
    weights = tmp_path / "p" / "emulator.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    code, _, err = run("inspect", str(tmp_path / "p"))
    assert code == 2
    assert "is not the one its manifest announces" in err
