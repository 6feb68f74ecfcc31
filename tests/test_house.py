"""The house itself: the README's tree is the files, files stay small, and words mean one thing."""

import ast
import re
import subprocess
from pathlib import Path

from tests.tree import BEGIN, END, files, first_line, tree

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (
    "adapter",
    "bench",
    "cli",
    "client",
    "coordinator",
    "emulator",
    "errors",
    "privacy",
    "protos",
    "secagg",
    "task",
    "trust",
)


def sources() -> list[Path]:
    return [p for room in ROOMS for p in sorted((ROOT / room).glob("*.py")) if not p.stem.endswith("_pb2")]


def test_the_readmes_tree_is_the_files() -> None:
    """`make tree` writes it."""
    assert f"{BEGIN}{tree()}{END}" in (ROOT / "README.md").read_text()


def test_every_file_says_what_it_is() -> None:
    assert [name for name in files() if not first_line(name)] == []


def test_files_and_functions_stay_small() -> None:
    for path in sources():
        text = path.read_text()
        assert text.count("\n") <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno <= 75, f"{path}:{node.name}"


def test_bare_delta_is_the_dp_parameter() -> None:
    """A weight difference is an update; `delta` stands for the DP parameter, with privacy's numbers only."""
    for path in sources():
        if path.parent.name in ("adapter", "emulator", "secagg", "task"):
            assert not re.search(r"\bdelta\b", path.read_text()), path


def test_no_folder_that_means_nothing() -> None:
    names = {p.name for p in ROOT.iterdir() if p.is_dir()}
    assert not names & {"utils", "common", "core", "internal", "base", "benchmarks", "lib"}


def test_nothing_is_printed_outside_the_command() -> None:
    for path in sources():
        if path.parent.name not in ("cli", "bench"):
            assert not re.search(r"(?m)^\s*print\(", path.read_text()), path


def test_the_stubs_are_fresh() -> None:
    from offsite.protos.fresh import stale

    assert stale() == []


def test_no_path_of_a_machine_is_committed() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        if name.endswith((".py", ".md", ".toml", ".txt", ".yml")) and name != "tests/test_house.py":
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not re.search(r"/(work|root)/\w", text), name
