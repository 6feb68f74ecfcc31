"""The house itself: the tree in docs/ is the files, files stay small, and words mean one thing."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

from tests.tree import files, first_line, page

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (
    "adapter",
    "bench",
    "cli",
    "client",
    "coordinator",
    "demo",
    "emulator",
    "errors",
    "privacy",
    "protos",
    "secagg",
    "simulation",
    "task",
    "trust",
)

TABLES = (ROOT / "adapter" / "methods", ROOT / "emulator" / "compressors")


def sources() -> list[Path]:
    return [p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py")) if "_pb2" not in p.stem]


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def test_the_tree_is_the_files() -> None:
    """`make tree` writes it."""
    assert page() == (ROOT / "docs" / "tree.md").read_text()


def test_every_file_says_what_it_is() -> None:
    assert [name for name in files() if not first_line(name)] == []


def test_files_and_functions_stay_small() -> None:
    for path in sources():
        text = path.read_text()
        assert text.count("\n") <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno <= 75, f"{path}:{node.name}"


def test_bare_delta_is_the_dp_parameter() -> None:
    """A weight difference is an update; `delta` stands for the DP parameter, with privacy's numbers only."""
    for path in sources():
        if room(path) in ("adapter", "emulator", "secagg", "task"):
            assert not re.search(r"\bdelta\b", path.read_text()), path


def test_no_folder_that_means_nothing() -> None:
    names = {p.name for room in ROOMS for p in (ROOT / room).rglob("*") if p.is_dir()} | {
        p.name for p in ROOT.iterdir()
    }
    assert not names & {"utils", "common", "core", "internal", "base", "benchmarks", "lib"}


def test_nothing_is_printed_outside_the_command() -> None:
    for path in sources():
        if room(path) not in ("cli", "bench"):
            assert not re.search(r"(?m)^\s*print\(", path.read_text()), path


def test_the_stubs_are_fresh() -> None:
    from offsite.protos.fresh import stale

    assert stale() == []


def packages() -> list[str]:
    folders = {
        p.parent.relative_to(ROOT) for name in ROOMS if name != "bench" for p in (ROOT / name).rglob("__init__.py")
    }
    return ["offsite", *sorted("offsite." + ".".join(folder.parts) for folder in folders)]


def test_every_room_is_one_link_below_the_importable_name() -> None:
    links = {p.name: p.readlink() for p in (ROOT / "offsite").iterdir() if p.is_symlink()}
    assert links == {name: Path("..") / name for name in ROOMS if name != "bench"}


def test_wheel_and_import_contract_know_every_folder() -> None:
    """A folder that is not listed would be missing from the wheel, or could hold a ring of imports unseen."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert sorted(settings["setuptools"]["packages"]) == packages()
    (rings,) = (one for one in settings["importlinter"]["contracts"] if one["type"] == "acyclic_siblings")
    assert sorted(rings["ancestors"]) == packages()


def test_methods_and_compressors_do_not_know_each_other() -> None:
    """All files of a table are in the contract, but for those on which several entries stand."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (independent,) = (one for one in settings["contracts"] if one["type"] == "independence")
    shared = {"bottleneck", "frozen_bottleneck", "peft_tuners", "peft_tuner_table"}
    shared |= {"pairs", "refit"}
    found = {
        f"offsite.{p.parent.relative_to(ROOT)}.{p.stem}".replace("/", ".")
        for folder in TABLES
        for p in folder.glob("*.py")
    }
    assert set(independent["modules"]) == {
        name for name in found if name.rpartition(".")[2] not in shared | {"__init__"}
    }


def test_no_path_of_a_machine_is_committed() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        if name.endswith((".py", ".md", ".toml", ".txt", ".yml")) and name != "tests/test_house.py":
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not re.search(r"/(work|root)/\w", text), name
