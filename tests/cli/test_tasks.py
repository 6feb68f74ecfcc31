"""The commands with another task than language modelling: columns by name, and the task's measures in the report."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offsite.cli import main as command
from offsite.emulator.package.package_reader import read_manifest
from offsite.task.tasks import TASKS
from tests.task_samples import LABELS, Sample, first_of

OWNERS = ("ash", "birch", "cedar")
FED = """
seed = 1
[model]
path = "model"
task = "sequence_classification"
[data]
public = "public.csv"
length = 16
column = "body"
columns = { label = "kind" }
[emulator]
first = 1
last = 1
compress = ["int8:16"]
gate = 0.0
[adapter]
method = "lora"
targets = ["value"]
rank = 2
[training]
rounds = 1
batch = 8
[privacy]
accountant = "rdp"
[evaluation]
examples = 12
public_examples = 8
tolerance = 5.0
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["offsite", *arguments])
        with pytest.raises(SystemExit) as stopped:
            command.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return call


def write_csv(records: list[dict[str, Any]], path: Path, broken: str = "") -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["number", "kind", "body"])
        rows.writerows([at, record["label"], record["text"]] for at, record in enumerate(records))
        if broken:
            rows.writerow([0, broken, "w1"])


@pytest.fixture
def fed(tmp_path: Path) -> Path:
    """A federation that sorts texts, from csv files with other names of columns."""
    sample = first_of("sequence_classification")
    sample.save(tmp_path / "model")
    write_csv(sample.records(40, 2), tmp_path / "public.csv")
    sites = []
    for number, owner in enumerate(OWNERS):
        for part, count in (("train", 48), ("heldout", 6)):
            write_csv(sample.records(count, 10 * number + count), tmp_path / f"{owner}-{part}.csv")
        sites.append(f'[[sites]]\nname = "{owner}"\ntrain = "{owner}-train.csv"\nheldout = "{owner}-heldout.csv"\n')
    (tmp_path / "fed.toml").write_text(FED + "".join(sites))
    return tmp_path / "fed.toml"


def test_a_classifiers_run_reports_its_own_measures(fed: Path, run: Run) -> None:
    out, numbers = fed.parent / "out", {name: number for number, name in LABELS.items()}
    records = first_of("sequence_classification").records(48, 68)
    numbered = [{**record, "label": numbers.get(record["label"], record["label"])} for record in records]
    write_csv(numbered, fed.parent / "cedar-train.csv")
    code, _, err = run("simulate", str(fed), "--out", str(out))
    assert code == 0, err
    assert (
        "labels are numbers without names at site=cedar, and names at public, site=ash, site=ash (held out), site=birch"
        in err
    )
    quality = json.loads((out / "report.json").read_text())["quality"]
    for kind, targets in (("private", 12), ("public", 8)):
        for score in quality[kind].values():
            assert score["targets"] == targets
            assert set(score["metrics"]) == {"accuracy", "balanced_accuracy", "macro_f1"}
            assert 0 <= score["metrics"]["accuracy"] <= 1
    for name in ("report.md", "report.html"):
        text = (out / name).read_text()
        assert "erplexity" not in text
        assert "nats per token" not in text
        assert "Accuracy is the share of answers that are right." in text
        assert "private macro f1" in text
    plug_in = quality["private"]["plug_in"]["metrics"]
    before = quality["private"]["full_zero_shot"]["metrics"]
    assert f"accuracy {plug_in['accuracy']:.3f} against {before['accuracy']:.3f}" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('{ label = "kind" }', '{ lable = "kind" }', "columns.lable: the task reads text, label; did you mean label"),
        ('{ label = "kind" }', '{ label = "knid" }', r"column='knid' is not in"),
        ('{ label = "kind" }', '{ label = "number" }', "must be one of the model's 3 labels"),
        ('{ label = "kind" }', '{ text = "number" }', "column='body' and columns.text='number'"),
        ('{ label = "kind" }', "7", "data.columns=7: must be a table"),
        ('{ label = "kind" }', "{ label = 7 }", "data.columns.label=7: must be of type str"),
        ("length = 16", "length = 16\nsplit = 'blocks'", "write split = 'truncate'"),
        ("length = 16", "length = 64", "length=64: must be at most 40"),
        ("sequence_classification", "sequence_clasification", "did you mean sequence_classification"),
        ("sequence_classification", "seq2seq", "must be a sequence to sequence model of transformers"),
    ],
)
def test_a_mistake_is_one_line(fed: Path, run: Run, old: str, new: str, expected: str) -> None:
    text = fed.read_text()
    assert old in text
    changed = text.replace(old, new)
    if new == "seq2seq":
        changed = changed.replace(
            'column = "body"\ncolumns = { label = "kind" }', 'column = "body"\ncolumns = { target = "kind" }'
        )
    fed.write_text(changed)
    code, _, err = run("simulate", str(fed), "--out", str(fed.parent / "out"))
    last = err.strip().splitlines()[-1]
    assert code == 2
    assert last.startswith("offsite: ")
    assert expected in last


def test_a_wrong_label_of_a_site_is_named_by_site_and_line_and_never_shown(fed: Path, run: Run) -> None:
    sample = first_of("sequence_classification")
    write_csv(sample.records(48, 12), fed.parent / "birch-train.csv", broken="a private sentence")
    code, _, err = run("simulate", str(fed), "--out", str(fed.parent / "out"))
    assert code == 2
    assert "offsite: site=birch: data=" in err
    assert "line=50 field='label': must be one of the model's 3 labels (ham, spam, news)" in err
    assert "a private sentence" not in err
    assert list(LABELS.values()) == ["ham", "spam", "news"]


@pytest.mark.parametrize(
    "name", [name for name in TASKS if set(TASKS[name].columns.values()) <= {str, int, list, object}]
)
def test_an_emulator_is_built_for_it(name: str, run: Run, tmp_path: Path) -> None:
    sample: Sample = first_of(name)
    if sample.suffix != ".jsonl":
        pytest.skip("its records are no text")
    sample.save(tmp_path / "model")
    main, *rest = TASKS[name].columns
    lines = (
        {f"my_{main}": record[main]} | {field: record[field] for field in rest} for record in sample.records(160, 2)
    )
    (tmp_path / "public.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = run(
        *("emulator", "build", str(tmp_path / "model"), "--calibration", str(tmp_path / "public.jsonl")),
        *("--out", str(tmp_path / "p"), "--task", name, "--columns", f"{main}=my_{main}", "--recipe", "int8:16"),
        *("--length", str(sample.length), "--sequences", "8", "--first", "1", "--last", "1", "--gate", "0.05"),
        *("--rank", "2", "--targets", " ".join(sample.targets)),
    )
    assert code == 0, err
    assert "gradient cosine: " in out
    manifest = read_manifest(tmp_path / "p")
    assert manifest.recipe == ("int8:16",)
    code, out, err = run("emulator", "vet", str(tmp_path / "p"), "--seed", "1")
    assert code == 0, err
    assert "no known trap" in out


def test_columns_have_to_be_pairs(run: Run, tmp_path: Path) -> None:
    sample = first_of("causal_lm")
    sample.save(tmp_path / "model")
    arguments = ("--calibration", str(tmp_path), "--out", str(tmp_path / "p"), "--columns", "body")
    code, _, err = run("emulator", "build", str(tmp_path / "model"), *arguments)
    assert code == 2
    assert "columns='body': write field=column" in err
