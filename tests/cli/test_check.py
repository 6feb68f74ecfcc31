"""`offsite check`, and the same check as the first step of a run: all faults at once, and nothing is written."""

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from PIL import Image

import offsite
from offsite.cli import main as command
from tests.conftest import sentence
from tests.task_samples import LABELS, Sample, first_of

FED = """
seed = 1
[model]
path = "model"
task = "sequence_classification"
[data]
public = "public.jsonl"
length = 16
[[sites]]
name = "ash"
train = "ash.jsonl"
heldout = "ash-held.jsonl"
[[sites]]
name = "birch"
train = "birch.csv"
heldout = "birch-held.jsonl"
[[sites]]
name = "cedar"
train = "cedar.jsonl"
heldout = "cedar-held.jsonl"
[training]
rounds = 1
batch = 8
[emulator]
first = 1
last = 1
"""
FILES = ("public", "ash", "ash-held", "birch-held", "cedar", "cedar-held")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of three sites with texts and labels, in which nothing is wrong."""
    folder = tmp_path_factory.mktemp("labelled")
    sample: Sample = first_of("sequence_classification")
    sample.save(folder / "model")
    for seed, name in enumerate(FILES):
        write(folder / f"{name}.jsonl", sample.records(34, seed))
    rows = sample.records(34, 40)
    (folder / "birch.csv").write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    (folder / "fed.toml").write_text(FED)
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(made, tmp_path / "world")
    return tmp_path / "world"


def write(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def edit(path: Path, line: int, text: str) -> None:
    """Replaces a line of a file, counted from 1."""
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")


def tree(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything below a folder: kind and mode, time of the last change, and content."""
    return {
        str(path): (path.stat().st_mode, path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


class Writes:
    """Every attempt of this process to write below a folder, as Python's audit events tell it."""

    def __init__(self) -> None:
        self.folders: tuple[str, ...] = ()
        self.seen: list[str] = []
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.folders:
            return
        writing = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod")
        if event == "open":
            flags = arguments[2]
            writing = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writing and str(arguments[0]).startswith(self.folders) and "__pycache__" not in str(arguments[0]):
            self.seen.append(f"{event} {arguments[0]}")


WRITES = Writes()  # a hook stays as long as the process


def lines_of(*arguments: str) -> tuple[int, list[str], str]:
    """Runs the command; returns its exit code, the lines of its errors, and all that it printed."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.argv", ["offsite", *arguments])
        with pytest.raises(SystemExit) as stopped:
            command.main()
    lines = [line for line in err.getvalue().splitlines() if line.startswith("offsite: ")]
    return int(stopped.value.code or 0), lines, out.getvalue() + err.getvalue()


def plant(world: Path) -> list[list[str]]:
    """Ten errors in five files; returns parts of the finding for each."""
    ash, birch, cedar, held = (world / name for name in ("ash.jsonl", "birch.csv", "cedar.jsonl", "ash-held.jsonl"))
    edit(ash, 18, json.dumps({"text": "w1 w2"}))
    edit(ash, 20, "{broken")
    edit(ash, 33, json.dumps({"text": "w1 w2", "label": "spma"}))
    edit(birch, 5, "w1 w2")
    edit(birch, 9, "w1 w2,eggs")
    edit(cedar, 2, json.dumps({"text": 7, "label": "ham"}))
    cedar.write_bytes(cedar.read_bytes().replace(b"\n", b"\n\xff\xfe\n", 1))
    edit(held, 34, json.dumps({"text": "w1 w2", "label": 9}))
    fed = (world / "fed.toml").read_text()
    fed = fed.replace("batch = 8", "batch = 8\nlerning_rate = 0.1").replace('"birch-held.jsonl"', '"birch-hold.jsonl"')
    (world / "fed.toml").write_text(fed)
    return [
        ["training.lerning_rate is not known", "did you mean learning_rate"],
        ["site=ash: ", "ash.jsonl", "line=18", "column='label' is not in"],
        ["site=ash: ", "ash.jsonl", "line=20 is not JSON"],
        ["site=ash: ", "ash.jsonl", "line=33 field='label'", "must be one of the model's 3 labels"],
        ["site=birch: ", "birch.csv", "line=5 has 1 fields, must have 2"],
        ["site=birch: ", "birch.csv", "line=9 field='label'"],
        ["site=cedar: ", "cedar.jsonl", "line=2 is not UTF-8"],
        ["site=cedar: ", "cedar.jsonl", "line=3 column='text' holds int"],
        ["site=ash: ", "ash-held.jsonl", "line=34 field='label'"],
        ["site=birch: ", "birch-hold.jsonl", "does not exist"],
    ]


def test_ten_errors_in_five_files_are_ten_findings_of_one_run(world: Path, tmp_path: Path) -> None:
    expected = plant(world)
    before = tree(tmp_path)
    code, lines, output = lines_of("check", str(world / "fed.toml"), "--out", str(world / "runs" / "new"))
    assert code == 2, output
    assert len(lines) == 10, output
    for parts in expected:
        assert [line for line in lines if all(part in line for part in parts)], (parts, output)
    assert tree(tmp_path) == before
    code, again, output = lines_of("simulate", str(world / "fed.toml"), "--out", str(world / "runs" / "new"))
    assert code == 2
    assert again == lines
    assert tree(tmp_path) == before


def test_a_federation_in_which_nothing_is_wrong(made: Path) -> None:
    before = tree(made)
    code, lines, output = lines_of("check", str(made / "fed.toml"), "--out", str(made / "run"))
    assert (code, lines) == (0, []), output
    assert "all is well" in output
    assert tree(made) == before


@pytest.mark.parametrize(
    ("device", "finding"),
    [("gpu1", "compute.device='gpu1': must be auto, cpu, cuda"), ("cuda:7", "device='cuda:7': PyTorch ")],
)
def test_a_device_that_is_not_here(world: Path, device: str, finding: str) -> None:
    (world / "fed.toml").write_text((world / "fed.toml").read_text() + f'[compute]\ndevice = "{device}"\n')
    code, lines, output = lines_of("check", str(world / "fed.toml"))
    assert (code, len(lines)) == (2, 1), output
    assert finding in output
    code, _, output = lines_of("check", str(world / "fed.toml"), "--device", "cpu")
    assert code == (0 if device == "cuda:7" else 2), output


@pytest.mark.parametrize(
    ("dtype", "finding", "mended"),
    [
        ("half", "compute.dtype='half': must be auto, float32, bfloat16 or float16", 2),
        ("float16", "dtype='float16' on the CPU takes four to ten times as long as float32", 0),
    ],
)
def test_a_number_format_that_is_none_here(world: Path, dtype: str, finding: str, mended: int) -> None:
    (world / "fed.toml").write_text((world / "fed.toml").read_text() + f'[compute]\ndtype = "{dtype}"\n')
    code, lines, output = lines_of("check", str(world / "fed.toml"), "--device", "cpu")
    assert (code, len(lines)) == (2, 1), output
    assert finding in output
    code, _, output = lines_of("check", str(world / "fed.toml"), "--dtype", "float32")
    assert code == mended, output


@pytest.mark.parametrize("planted", [False, True])
def test_nothing_is_written_anywhere_near(world: Path, tmp_path: Path, planted: bool) -> None:
    """In folders that may only be read, no write is even tried, neither beside the file nor in the current folder."""
    if planted:
        plant(world)
    place = tmp_path / "place"
    place.mkdir()
    for path in (world, *world.rglob("*"), place):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before, seen = tree(tmp_path), len(WRITES.seen)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        WRITES.folders = (str(tmp_path), str(place), str(Path.home()))
        try:
            code, _, output = lines_of("check", str(world / "fed.toml"), "--out", str(tmp_path / "run"))
        finally:
            WRITES.folders = ()
    assert code == (2 if planted else 0), output
    assert WRITES.seen[seen:] == []
    assert tree(tmp_path) == before


def test_numbers_at_one_site_beside_names_at_the_others_are_told(world: Path) -> None:
    """Whether the numbers follow the model's order cannot be seen in a file of numbers."""
    rows = [json.loads(line) for line in (world / "cedar.jsonl").read_text().splitlines()]
    numbers = {name: number for number, name in LABELS.items()}
    write(world / "cedar.jsonl", [row | {"label": numbers.get(row["label"], row["label"])} for row in rows])
    code, _, output = lines_of("check", str(world / "fed.toml"))
    assert code == 0
    others = "public, site=ash, site=ash (held out), site=birch"
    assert f"warning: labels are numbers without names at site=cedar, and names at {others}" in output


@pytest.mark.parametrize(("name", "where"), [("ash-held", "site=ash (held out)"), ("public", "public")])
def test_numbers_beside_names_are_told_of_held_out_and_public_files_too(world: Path, name: str, where: str) -> None:
    numbers = {name: number for number, name in LABELS.items()}
    path = world / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write(path, [row | {"label": numbers.get(row["label"], row["label"])} for row in rows])
    code, _, output = lines_of("check", str(world / "fed.toml"))
    assert code == 0, output
    assert f"warning: labels are numbers without names at {where}, and names at " in output


# Value of one label -> part of the finding.
LABELS_UNSEEN = {
    "eggs": "must be one of the model's 3 labels",
    "Ham": "did you mean ham; case, spaces and invisible signs count",
    "ham\u00a0": "did you mean ham; case, spaces and invisible signs count",
    "\ufeffham": "did you mean ham; case, spaces and invisible signs count",
    " 1": "did you mean spam; case, spaces and invisible signs count",
    "True": "a boolean is read by name",
    "": "must be one of the model's 3 labels",
    7: "must be one of the model's 3 labels",
    1.5: "column='label' holds float",
    None: "column='label' holds NoneType",
}


def test_labels_of_held_out_and_public_files_are_found_with_all_other_findings(world: Path) -> None:
    """Each with its site, file and line, in one run; a column that a whole file lacks is one finding."""
    for name, line in (("ash-held", 3), ("birch-held", 7), ("public", 11)):
        for at, value in enumerate(LABELS_UNSEEN):
            edit(world / f"{name}.jsonl", line + at, json.dumps({"text": "w1 w2", "label": value}))
    path = world / "cedar-held.jsonl"
    path.write_text(path.read_text().replace('"label"', '"kind"'))
    code, lines, output = lines_of("check", str(world / "fed.toml"))
    assert code == 2
    assert len(lines) == 3 * len(LABELS_UNSEEN) + 1, output
    for name, site, line in (("ash-held", "site=ash: ", 3), ("birch-held", "site=birch: ", 7), ("public", "", 11)):
        for at, rule in enumerate(LABELS_UNSEEN.values()):
            start, place = f"offsite: {site}data=", f"{name}.jsonl' line={line + at} "
            assert [own for own in lines if own.startswith(start) and place in own and rule in own], (place, rule)
    (own,) = [own for own in lines if own.startswith("offsite: site=cedar: column='label' is not in data=")]
    assert own.endswith("(the same in all 34 records)")


def test_an_ambiguous_label_of_a_held_out_file_is_refused_with_both_readings(world: Path) -> None:
    config = json.loads((world / "model" / "config.json").read_text())
    stars = {"ham": "1 star", "spam": "2 stars", "news": "3 stars"}
    config |= {"id2label": dict(enumerate(stars.values())), "label2id": {n: at for at, n in enumerate(stars.values())}}
    (world / "model" / "config.json").write_text(json.dumps(config))
    for path in [*world.glob("*.jsonl"), world / "birch.csv"]:
        rows = [{"text": "w1 w2", "label": list(stars.values())[at % 3]} for at in range(34)]
        if path.suffix == ".csv":
            path.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
        else:
            write(path, rows)
    edit(world / "ash-held.jsonl", 5, json.dumps({"text": "w1 w2", "label": 1}))
    edit(world / "public.jsonl", 6, json.dumps({"text": "w1 w2", "label": "2"}))
    code, lines, output = lines_of("check", str(world / "fed.toml"))
    assert (code, len(lines)) == (2, 2), output
    for start, place in (
        ("offsite: site=ash: data=", "ash-held.jsonl' line=5 "),
        ("offsite: data=", "public.jsonl' line=6 "),
    ):
        (line,) = [line for line in lines if line.startswith(start) and place in line]
        assert (
            "field='label': must not be a number: here 1 could mean '1 star' in place 0 or '2 stars' in place 1" in line
        )


def images(folder: Path, labels: list[str]) -> None:
    """Writes 34 pictures into a folder for each label."""
    for at in range(34):
        place = folder / labels[at % len(labels)]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (at, 0, 0)).save(place / f"{at}.png")


def test_what_folders_of_images_hold_beside_images_is_told(tmp_path: Path) -> None:
    """Documents are counted in one line for each folder, hidden files are not; a class of another name is a finding."""
    first_of("image_classification").save(tmp_path / "model")
    labels = list(json.loads((tmp_path / "model" / "config.json").read_text())["id2label"].values())
    text = re.sub(r'"([a-z-]+)\.(jsonl|csv)"', r'"\1"', FED).replace("[data]", '[data]\nreader = "images"')
    (tmp_path / "fed.toml").write_text(text.replace("sequence_classification", "image_classification"))
    for name in (*FILES, "birch"):
        images(tmp_path / name, labels)
    held = tmp_path / "cedar-held"
    (held / labels[0] / "Smith.docx").write_text("text")
    (held / "README.md").write_text("text")
    (tmp_path / "ash" / labels[0] / "Thumbs.db").write_text("text")
    (tmp_path / "ash" / "__MACOSX").mkdir()
    (tmp_path / "public" / "loose.png").write_bytes(b"")
    code, _, output = lines_of("check", str(tmp_path / "fed.toml"), "--json")
    found = json.loads(output[output.index("{") :])
    assert (code, found["errors"]) == (0, [])
    assert [line for line in found["warnings"] if "passed over" in line] == [
        f"data='{tmp_path}/public': images=34 are read, files passed over: .png in no class's folder 1",
        f"site=cedar: data='{held}': images=34 are read, files passed over: .docx 1, .md 1",
    ]
    (held / labels[0]).rename(held / f"{labels[0]} ".title())
    code, lines, output = lines_of("check", str(tmp_path / "fed.toml"))
    assert code == 2
    assert all(line.startswith(f"offsite: site=cedar: data='{held}' image=") for line in lines), output
    assert f"did you mean {labels[0]}; case, spaces and invisible signs count" in lines[0]


def test_no_record_is_quoted(world: Path) -> None:
    edit(world / "ash.jsonl", 3, json.dumps({"text": "secret w1", "label": "secretlabel"}))
    edit(world / "ash.jsonl", 4, '{"text": "secret')
    _, lines, output = lines_of("check", str(world / "fed.toml"))
    assert len(lines) == 2
    assert "secret" not in output


Broken = Callable[[Path], None]


def _named_wrong(world: Path) -> None:
    for name in ("ash", "cedar"):
        path = world / f"{name}.jsonl"
        path.write_text(path.read_text().replace('"label"', '"kind"'))


def _small(world: Path) -> None:
    path = world / "cedar.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:10]) + "\n")


def _blank(world: Path) -> None:
    write(world / "ash.jsonl", [{"text": " ", "label": "ham"}] * 34)


def _cut(world: Path) -> None:
    path = world / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pointer(world: Path) -> None:
    (world / "model" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")


def _settings(old: str, new: str) -> Broken:
    def change(world: Path) -> None:
        text = (world / "fed.toml").read_text()
        assert old in text
        (world / "fed.toml").write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (_named_wrong, [["site=ash", "column='label' is not in", "(the same in all 34 records)"], ["site=cedar"]]),
        (_small, [["site=cedar: records=10: fewer than twice the expected batch=8"]]),
        (_blank, [["site=ash", "holds no text"]]),
        (_cut, [["file='model.safetensors' cannot be read, it is cut or damaged"]]),
        (_pointer, [["file='model.safetensors' is a pointer of Git LFS"]]),
        (_settings("length = 16", "length = 64"), [["length=64: must be at most 40"]]),
        (_settings("length = 16", "length = 16\nsplit = 'block'"), [["data.split='block'", "blocks"]]),
        (_settings("length = 16", "length = 2000000"), [["data.length=2000000: must be at most"]]),
        (
            _settings("[emulator]", "[privacy]\nepsilon = 1e9\n[emulator]"),
            [[f"site={name}: epsilon=1000000000.0", "the floor"] for name in ("ash", "birch", "cedar")],
        ),
        (_settings("batch = 8", "batch = 0"), [["training.batch=0: must be at least 1"]]),
        (_settings("seed = 1", "seed = -1"), [["seed=-1: must be at least 0"]]),
        (_settings("batch = 8", "batch = 40"), [[f"site={name}: records=34"] for name in ("ash", "birch", "cedar")]),
        (_settings("[emulator]", "[privacy]\nepsilon = 0.0\n[emulator]\ngate = 2.0"), [["privacy.epsilon"], ["gate"]]),
        (_settings('"public.jsonl"', '"birch-held.jsonl.gz"'), [["birch-held.jsonl.gz"]]),
        (_settings('"model"', '"models"'), [["models' is not a directory"]]),
        (_settings("first = 1", "first = 9"), [["first=9 last=1: the tower ", "blocks, so no middle is left"]]),
        (_settings("first = 1", "first = -1"), [["first=-1 last=1: neither may be negative"]]),
        (_settings("first = 1", 'first = 1\nshape = "sandwhich"'), [["shape='sandwhich' is neither"]]),
        (_settings("first = 1", 'first = 1\ncompress = ["int5:64"]'), [["compressor='int5' is not known"]]),
        (_settings("first = 1", 'first = 1\ncompress = ["int4:1"]'), [["int4='1': the group must be"]]),
        (_settings("first = 1", 'first = 1\ncompress = ["lowrank:2"]'), [["lowrank='2': the fraction of weights"]]),
        (_settings("first = 1", 'first = 1\ncompress = ["int8:64@7"]'), [["step='int8:64@7': place 7 is not in"]]),
        (
            _settings("first = 1", 'first = 1\nshape = "parallel"\ncompress = ["narrow:0.5"]'),
            [["narrow='0.5': in a parallel emulator"]],
        ),
        (_settings("[emulator]", '[adapter]\nmethod = "lorra"\n[emulator]'), [["method='lorra'", "lora"]]),
        (_settings("[emulator]", '[adapter]\nmethod = "xlora"\n[emulator]'), [["method='xlora' is not offered"]]),
        (_settings("[emulator]", '[adapter]\ntargets = ["quarry"]\n[emulator]'), [["quarry"]]),
        (_settings("[emulator]", '[adapter]\nmethod = "clip_adapter"\n[emulator]'), [["needs CLIP"]]),
        (_settings("[emulator]", '[aggregation]\nrule = "fedadm"\n[emulator]'), [["aggregation.rule='fedadm'"]]),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_each_kind_of_fault(world: Path, broken: Broken, expected: list[list[str]]) -> None:
    broken(world)
    code, lines, output = lines_of("check", str(world / "fed.toml"))
    assert code == 2, output
    assert len(lines) == len(expected), output
    for parts in expected:
        assert [line for line in lines if all(part in line for part in parts)], (parts, output)


def test_a_site_with_nothing_to_learn_is_refused_and_one_with_little_is_named(fed: Path, tmp_path: Path) -> None:
    """Prompts longer than `data.length` leave no token of an answer."""
    short = [{"prompt": sentence(f"p{at}", 4), "completion": sentence(f"c{at}", 4)} for at in range(34)]
    long = [{"prompt": sentence(f"l{at}", 20), "completion": "w1"} for at in range(34)]
    for name in ("public", "birch", "cedar", "held"):
        write(tmp_path / f"{name}.jsonl", short)
    write(tmp_path / "ash.jsonl", long)
    write(tmp_path / "birch.jsonl", short[:17] + long[:17])
    text = FED.replace("sequence_classification", "prompt_completion").replace("birch.csv", "birch.jsonl")
    for name in ("ash", "birch", "cedar"):
        text = text.replace(f"{name}-held", "held")
    (tmp_path / "fed.toml").write_text(text.replace('"model"', f'"{fed.parent / "model"}"'))
    code, lines, output = lines_of("check", str(tmp_path / "fed.toml"))
    assert code == 2
    (line,) = lines
    assert "site=ash: training data: 34 of 34 records came to nothing; the first because " in line
    assert "line=1: its first 16 tokens hold nothing to learn; with data.length = 64" in line
    assert "warning: site=birch: training data: 9 of 18 records came to nothing; the first because " in output
    assert "(of 34 records, 18 were tried)" in output
    write(tmp_path / "ash.jsonl", short)
    write(tmp_path / "public.jsonl", long)
    _, (line,), _ = lines_of("check", str(tmp_path / "fed.toml"))
    assert "public data: 34 of 34 records came to nothing; the first because " in line
    write(tmp_path / "public.jsonl", short[:20] + long[:10])
    _, (line,), _ = lines_of("check", str(tmp_path / "fed.toml"))
    assert "public records=20 with something to learn: at least 32 are needed; 10 of 30 records came to" in line


def test_a_run_counts_what_each_site_could_not_learn(fed: Path, tmp_path: Path) -> None:
    """One of three sites has prompts that leave no answer; the report says so in a warning and in a table."""
    short = [{"prompt": sentence(f"p{at}", 4), "completion": sentence(f"c{at}", 4)} for at in range(34)]
    long = [{"prompt": sentence(f"l{at}", 20), "completion": "w1"} for at in range(34)]
    for name, records in (("public", short), ("ash", short), ("birch", short[:17] + long[:17]), ("held", short)):
        write(tmp_path / f"{name}.jsonl", records)
    text = FED.replace("sequence_classification", "prompt_completion").replace("birch.csv", "birch.jsonl")
    text = text.replace("cedar.jsonl", "ash.jsonl").replace('"model"', f'"{fed.parent / "model"}"')
    for name in ("ash", "birch", "cedar"):
        text = text.replace(f"{name}-held", "held")
    (tmp_path / "fed.toml").write_text(
        text + "gate = 0.1\ncompress = ['int8:32']\n[privacy]\nprivate = false\n[evaluation]\nexamples = 6\n"
    )
    report = offsite.simulate(tmp_path / "fed.toml", tmp_path / "run")
    told = "site=birch training data: 17 of 34 records came to nothing; the first because data="
    assert [line for line in report.warnings if line.startswith(told)]
    rows = {(own.site, own.part): (own.records, own.left_out) for own in report.data}
    assert rows["birch", "training"] == (34, 17)
    assert rows["ash", "training"] == rows["birch", "held out"] == rows["", "public"] == (34, 0)
    assert len(rows) == 7
    page = (tmp_path / "run" / "report.md").read_text()
    assert "| birch, training | 34 | 17 |" in page
    assert told in page
    assert offsite.read_report(tmp_path / "run") == report


def test_of_a_large_file_all_labels_are_checked_and_some_records_are_tried(world: Path) -> None:
    path = world / "ash.jsonl"
    path.write_text(path.read_text() * 10)
    edit(path, 333, json.dumps({"text": "w1 w2", "label": "eggs"}))
    code, lines, output = lines_of("check", str(world / "fed.toml"))
    assert code == 2, output
    (line,) = lines
    assert "line=333 field='label'" in line
    assert list(LABELS.values()) == ["ham", "spam", "news"]
