"""`emulator.package`: a run takes a package that was built before, of this very model, and keeps its own copy."""

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offsite.cli import main as command
from offsite.coordinator.check.federation import check_coordinator
from offsite.coordinator.check.packages import check_packages
from offsite.coordinator.config.federation_file import read_config, read_with_faults
from offsite.coordinator.home.job_settings import settings_sha256
from offsite.emulator.package.manifest import GIVEN
from offsite.emulator.package.package_reader import read_manifest
from offsite.errors import ConfigError, DigestMismatch
from offsite.simulation.begin import begin, resume
from offsite.simulation.run_folder import Origin, Run
from offsite.task.findings import Findings
from tests.conftest import sentence

BUILD = ("--first", "1", "--last", "1", "--length", "16", "--sequences", "24", "--gate", "0.05", "--rank", "2")
RECIPE = 'compress = ["int4:32"]\n'


def offsite(*arguments: str) -> tuple[int, str]:
    """Runs a command; returns its exit code and all that it printed."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(out):
        patch.setattr("sys.argv", ["offsite", *arguments])
        with pytest.raises(SystemExit) as stopped:
            command.main()
    return int(stopped.value.code or 0), out.getvalue()


@pytest.fixture(scope="module")
def built(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package as the command makes it, from records that the job does not use."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "other.txt").write_text(sentence("public", 16 * 80))
    data = ("--calibration", str(folder / "other.txt"), "--out", str(folder / "p"))
    code, output = offsite("emulator", "build", str(fed.parent / "model"), *data, *BUILD, "--recipe", "int4:32")
    assert code == 0, output
    return folder / "p"


@pytest.fixture
def world(fed: Path, built: Path, tmp_path: Path) -> Path:
    """A federation file that names a copy of the package; a test may break the copies of package and model."""
    shutil.copytree(built, tmp_path / "p")
    shutil.copytree(fed.parent / "model", tmp_path / "model")
    (tmp_path / "data").symlink_to(fed.parent / "data")
    quick = '[privacy]\naccountant = "rdp"\n\n[training]'  # its plan is made in no time
    text = fed.read_text().replace(RECIPE, 'package = "p"\n').replace("[training]", quick)
    (tmp_path / "fed.toml").write_text(text)
    return tmp_path / "fed.toml"


def change(file: Path, old: str, new: str) -> None:
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))


def found(file: Path, out: Path | None = None) -> list[str]:
    """Returns what the check of packages finds; it is a part of the checks of simulations and of coordinators."""
    findings = Findings()
    check_packages(read_config(file)[0], out or file.parent / "run", findings)
    assert findings.warnings == []
    return findings.errors


def begun(file: Path) -> Run:
    return begin(file, file.parent / "run", Origin(), on_warning=lambda line: None)


# the same job


def test_a_package_gives_the_job_that_its_recipe_gives(fed: Path, world: Path, tmp_path: Path) -> None:
    """The package of one run is the package of another; gate, clip and scores are the same to the last bit."""
    config, sha256 = read_config(fed)
    recipe = Run.create(config, sha256, tmp_path / "recipe")
    first = recipe.open_job()
    shutil.rmtree(tmp_path / "p")
    shutil.copytree(recipe.store.package, tmp_path / "p")
    taken = begun(world).open_job()
    assert taken.manifest.emulator == first.manifest.emulator == read_manifest(tmp_path / "p").digest()
    assert taken.manifest.privacy.max_grad_norm == first.manifest.privacy.max_grad_norm
    assert taken.manifest.update_bound == first.manifest.update_bound
    assert taken.manifest.base == first.manifest.base
    assert (taken.emulators, taken.zero_shot) == (first.emulators, first.zero_shot)


def test_a_whole_run_on_a_package_of_the_command_outlives_the_package(world: Path, tmp_path: Path) -> None:
    change(world, "rounds = 2", "rounds = 1")
    run = begun(world)
    made = run.open_job()
    assert (run.store.package / "emulator.safetensors").stat().st_nlink == 1  # a copy, and no second name
    assert made.emulator.facts.digest() == read_manifest(tmp_path / "p").digest()
    (tmp_path / "p" / "emulator.safetensors").write_bytes(b"changed")
    assert resume(tmp_path / "run", on_warning=lambda line: None).open_job().emulators == made.emulators
    shutil.rmtree(tmp_path / "p")
    code, output = offsite("simulate", "--resume", str(tmp_path / "run"))
    assert code == 0, output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["finished_rounds"] == 1
    (tmp_path / "model").rename(tmp_path / "gone")  # a written report is shown, and nothing is computed again
    code, again = offsite("simulate", "--resume", str(tmp_path / "run"))
    assert (code, again.splitlines()[-2:]) == (0, output.splitlines()[-2:]), again
    assert report["emulator"]["shipped_bytes"] == made.emulator.facts.shipped_bytes


def test_a_package_stands_beside_a_recipe_and_takes_auxiliary_tensors(fed: Path, world: Path, tmp_path: Path) -> None:
    """Sites of a variant get the package and the others a recipe; a mask of the job is added to the copy alone."""
    variant = '[[emulator.variants]]\nsites = ["birch", "elm"]\npackage = "p"\n'
    mask = '[adapter]\nmethod = "masked"\noptions = { by = "fisher", density = 0.05 }\n'
    world.write_text(fed.read_text().replace("[training]", f"{variant}\n{mask}\n[training]"))
    with pytest.raises(ConfigError, match="sites=birch, elm: is the emulator of sites=ash, cedar too"):
        begun(world).open_job()  # the same recipe, so the same bytes
    change(world, "int4:32", "int8:32")
    run = begun(world)
    job = run.open_job()
    built, (default, other) = read_manifest(tmp_path / "p"), job.emulators
    assert (default.sites, other.sites) == (("ash", "cedar"), ("birch", "elm"))
    assert default.facts.files[GIVEN] == other.facts.files[GIVEN]
    assert GIVEN not in built.files
    assert other.facts.tensors == built.tensors
    assert other.facts.digest() != built.digest()
    assert run.open_job().emulators == job.emulators
    change(world, 'package = "p"', 'package = "run/packages/birch"')
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    change(world, '"run/packages/birch"', '"old/packages/birch"')
    assert [line.split("old/packages/birch' ")[1][:22] for line in found(world, tmp_path / "new")] == [
        "holds given.safetensor"
    ]


def test_biases_of_a_package_are_refreshed_if_it_has_some(fed: Path, world: Path, tmp_path: Path) -> None:
    change(world, "gate = 0.1", "gate = -1.0\nrefresh = 1")
    with pytest.raises(ConfigError, match="refresh=1"):
        begun(world).open_job()
    (tmp_path / "aligned.toml").write_text(fed.read_text().replace(RECIPE, 'compress = ["int4:32", "center"]\n'))
    config, sha256 = read_config(tmp_path / "aligned.toml")
    aligned = Run.create(config, sha256, tmp_path / "aligned")
    aligned.open_job()
    change(world, 'package = "p"', 'package = "aligned/package"')
    assert begun(world).open_job().manifest.refresh == 1


# refused before any work


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def shift(name: str) -> Callable[[Path], None]:
    """Returns a change of one number of the model."""

    def changed(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        tensors = load_file(path)
        tensors[name].view(-1)[0] += 0.25
        save_file(tensors, path, metadata={"format": "pt"})

    return changed


def edited(name: str, **values: object) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(document | values))

    return changed


CASES = {
    "missing": (lambda folder: shutil.rmtree(folder / "p"), ["has no manifest.json"]),
    "damaged": (lambda folder: flip(folder / "p" / "emulator.safetensors"), ["'emulator.safetensors' is not the one"]),
    "added": (lambda folder: (folder / "p" / "more.txt").write_text("x"), ["'more.txt' is missing or was added"]),
    "linked": (
        lambda folder: (
            (folder / "p" / "config.json").rename(folder / "c"),
            (folder / "p" / "config.json").symlink_to(folder / "c"),
        ),
        ["'config.json' is not a plain file"],
    ),
    "other manifest": (lambda folder: (folder / "p" / "manifest.json").write_text("{}"), ["manifest: keys missing"]),
    "another slot": (shift("model.layers.0.mlp.up_proj.weight"), ["tensor=model.layers.0.mlp.up_proj.weight has oth"]),
    "another last slot": (
        shift("model.layers.5.input_layernorm.weight"),
        ["5.input_layernorm.weight has other"],
    ),
    "other word tables": (shift("model.embed_tokens.weight"), ["tensor=model.embed_tokens.weight has other values"]),
    "another norm": (shift("model.norm.weight"), ["tensor=model.norm.weight has other values"]),
    "another configuration": (
        edited("model/config.json", rms_norm_eps=1e-4),
        ["json differs in 'rms_norm_eps'"],
    ),
    "another tokenizer": (
        edited("model/tokenizer_config.json", model_max_length=99),
        ["has another tokenizer_config.json than the model's"],
    ),
    "another geometry": (
        lambda folder: change(folder / "fed.toml", "first = 1", "first = 2"),
        ["was built with first=1, and the file has 2; set emulator.first = 1"],
    ),
    "another shape": (
        lambda folder: change(folder / "fed.toml", "first = 1\nlast = 1", 'first = 2\nlast = 0\nshape = "parallel"'),
        ["set emulator.first = 1", "set emulator.last = 1", 'set emulator.shape = "sandwich"'],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_fault_is_found_before_a_run(world: Path, tmp_path: Path, name: str) -> None:
    spoil, expected = CASES[name]
    spoil(tmp_path)
    lines = found(world)
    assert len(lines) == len(expected), lines
    for line, part in zip(lines, expected, strict=True):
        assert line.startswith(f"emulator.package='{tmp_path}/p'")
        assert part in line
    assert not (tmp_path / "run").exists()


def test_all_findings_come_at_once_with_the_exit_code_of_a_refusal(world: Path, tmp_path: Path) -> None:
    flip(tmp_path / "p" / "tokenizer.json")
    shift("model.norm.weight")(tmp_path)
    change(world, "last = 1", 'last = 2\ncompress = ["int4:32"]\nembedding = "int4"')
    change(world, "batch = 8", "batch = 8\nlearning_rate = -1.0")
    code, output = offsite("check", str(world))
    assert code == 2
    for part in (
        "emulator.compress=['int4:32'] beside emulator.package='p'",
        "emulator.embedding='int4' beside emulator.package='p'",
        "training.learning_rate=-1.0",
        "file='tokenizer.json' is not the one",
        "set emulator.last = 1",
        "tensor=model.norm.weight has other values",
    ):
        assert output.count(part) == 1, (part, output)
    assert offsite("simulate", str(world), "--out", str(tmp_path / "run"))[0] == 2
    assert not (tmp_path / "run").exists()


def test_what_changed_since_the_check_is_refused(world: Path, tmp_path: Path) -> None:
    run = begun(world)
    path = tmp_path / "p" / "emulator.safetensors"
    whole = path.read_bytes()
    flip(path)
    with pytest.raises(DigestMismatch, match=r"'emulator\.safetensors' is not the one"):
        run.open_job()
    path.write_bytes(whole + b"more")
    with pytest.raises(DigestMismatch, match=r"'emulator\.safetensors' is not the one"):
        run.open_job()
    path.write_bytes(whole)
    shift("model.layers.0.mlp.up_proj.weight")(tmp_path)
    with pytest.raises(ConfigError, match=r"^emulator\.package='.*p' is of another model: tensor=model\.layers\.0"):
        run.open_job()


def test_another_middle_is_left_to_the_gate(world: Path, tmp_path: Path) -> None:
    """No manifest tells of the middle's weights, so the gradients must."""
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if ".layers.2." in name and name.endswith("proj.weight"):
            tensors[name] = 5 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, path, metadata={"format": "pt"})
    change(world, "gate = 0.1", "gate = 0.9")
    assert found(world) == []
    with pytest.raises(ConfigError, match="below the floor"):
        begun(world).open_job()


def test_a_coordinator_checks_a_package_until_the_job_is_prepared(world: Path, tmp_path: Path) -> None:
    change(world, "[training]", '[coordinator]\nhome = "home"\n\n[training]')
    shutil.rmtree(tmp_path / "p")
    config, out = read_config(world)[0], tmp_path / "run"
    for prepared in (False, True):
        findings = Findings()
        if prepared:
            out.mkdir()
            (out / "job.json").write_text("{}")
        check_coordinator(dataclasses.replace(config, sites=()), out, datetime.now(UTC), findings)
        assert any("has no manifest.json" in line for line in findings.errors) != prepared


def test_a_package_in_the_run_folder_would_be_cleared(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.move(tmp_path / "p", tmp_path / "run" / "package")
    change(world, 'package = "p"', 'package = "run/package"')
    assert ["lies in the run folder" in line for line in found(world)] == [True]


# keys of the file


def test_keys_of_a_build_contradict_a_package(world: Path) -> None:
    plain = world.read_text().replace('package = "p"\n', "")

    def faults(emulator: str, variant: str = "") -> list[str]:
        entry = f'[[emulator.variants]]\nsites = ["ash"]\n{variant}\n' if variant else ""
        text = plain.replace("[emulator]\n", f"[emulator]\n{emulator}\n").replace("[training]", f"{entry}[training]")
        world.write_text(text)
        return [str(fault) for fault in read_with_faults(world)[1]]

    assert faults('package = "p"') == faults('package = ""\ncompress = ["int8"]') == []
    assert faults("", 'package = "p"') == []
    (fault,) = faults('package = "p"\ncompress = []')
    assert fault.startswith("emulator.compress=[] beside emulator.package='p'")
    (fault,) = faults("", 'package = "p"\nembedding = "int8"')
    assert fault.startswith("emulator.variants[0].embedding='int8' beside emulator.variants[0].package='p'")
    (fault,) = faults('package = "p"', 'embedding = "int4"')
    assert "state compress in this entry too" in fault


def test_a_variant_with_a_recipe_of_its_own_leaves_the_package(world: Path) -> None:
    change(world, "[training]", '[[emulator.variants]]\nsites = ["elm"]\ncompress = ["int8"]\n[training]')
    default, other = read_config(world)[0].emulator.kinds(["ash", "birch", "cedar", "elm"])
    assert (default.package, default.compress) == (str(world.parent / "p"), ())
    assert (other.package, other.compress, other.embedding) == ("", ("int8",), "int8")


def test_the_settings_of_a_job_do_not_depend_on_where_its_folder_lies(world: Path, tmp_path: Path) -> None:
    change(world, "[training]", '[coordinator]\nhome = "home"\n\n[training]')
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "fed.toml").write_text(world.read_text())
    first, second = (settings_sha256(read_config(file)[0]) for file in (world, moved / "fed.toml"))
    assert first == second
    (moved / "fed.toml").write_text(world.read_text().replace('package = "p"', 'package = "q"'))
    assert settings_sha256(read_config(moved / "fed.toml")[0]) != first
