"""Changes the code in small ways, one at a time, and counts which changes the tests notice: `make mutants`.

A fixed seed draws the same changes from the same code. Each change is made in a copy of the tree; the tests that name
the changed module are run there until one fails, and where none fails, all tests of the module's room. A change after
which the module cannot be imported is none.

Neither mutmut nor cosmic-ray is used: both lack the change that matters most here, to leave a statement out (a refusal,
an fsync), mutmut does not follow the links of `offsite/`, and cosmic-ray has one test command for all files.
"""

import argparse
import ast
import difflib
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("secagg", "privacy", "trust", "client/site", "client/home")
TREE = ROOT / "build" / "mutants"
LEFT_OUT = "not processes and not slow and not statistical"
TEST_SECONDS = 900
NOTICED, UNNOTICED, NONE = "noticed", "NOT NOTICED", "no module"
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
      file: path in the tree.
      line: first changed line.
      text: the whole changed file.
    """

    file: str
    line: int
    text: str


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """Yields every change of a file, in the order of its code."""
    tree = ast.parse(source)
    spoken = {id(inner) for node in ast.walk(tree) if _speaks(node) for inner in ast.walk(node) if inner is not node}
    for node in ast.walk(tree):
        if id(node) in spoken:
            continue
        for changed in _changes(node):
            yield Mutant(file, node.lineno, _replaced(source, node, changed))  # type: ignore[attr-defined]


def _speaks(node: ast.AST) -> bool:
    """Says whether a node is words for people or for mypy, or a check of what the code itself guarantees.

    Such are messages, log lines and types, and `strict=` of `zip` over lists of the same code.
    """
    is_log = isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log.")
    is_strict = isinstance(node, ast.keyword) and node.arg == "strict"
    return isinstance(node, ast.Raise | ast.JoinedStr | ast.AnnAssign | ast.arguments) or is_log or is_strict


def _changes(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Raise() | ast.AugAssign() | ast.Expr(value=ast.Call()):
            yield "pass"
        case ast.Compare(left=left, ops=[operator], comparators=[right]) if type(operator) in COMPARISONS:
            yield f"({ast.unparse(ast.Compare(left, [COMPARISONS[type(operator)]()], [right]))})"
        case ast.BoolOp(op=ast.And(), values=values):
            yield f"({ast.unparse(ast.BoolOp(ast.Or(), values))})"
        case ast.BoolOp(values=values):
            yield f"({ast.unparse(ast.BoolOp(ast.And(), values))})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield f"({ast.unparse(operand)})"
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in OPERATORS:
            yield f"({ast.unparse(ast.BinOp(left, OPERATORS[type(operator)](), right))})"
        case ast.Constant(value=bool(value)):
            yield str(not value)
        case ast.Constant(value=int(value)):
            yield str(value + 1)


def _replaced(source: str, node: ast.AST, text: str) -> str:
    """Returns a source with other text in the place of a node; positions of the syntax tree count bytes of UTF-8."""
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    begin, end = (
        starts[line - 1] + column
        for line, column in ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))  # type: ignore[attr-defined]
    )
    content = source.encode()
    return (content[:begin] + text.encode() + content[end:]).decode()


def sample(seed: int, count: int) -> list[Mutant]:
    """Returns changes drawn without repetition: first a file, so that a long file does not take all, then a change."""
    draw, files = random.Random(seed), {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if found := list(mutants(name, path.read_text(encoding="utf-8"))):
                draw.shuffle(found)
                files[name] = found
    chosen: list[Mutant] = []
    while files and len(chosen) < count:
        name = draw.choice(sorted(files))
        chosen.append(files[name].pop())
        if not files[name]:
            del files[name]
    return chosen


def tests_of(file: str) -> Iterator[list[str]]:
    """Yields the test files that name a module, and then its room's tests with the contracts that name the room."""
    module = "offsite." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    parent, _, leaf = module.rpartition(".")
    room = file.partition("/")[0]
    named = _naming(rf"{re.escape(module)}\b|from {re.escape(parent)} import .*\b{leaf}\b", "tests")
    if named:
        yield named
    yield [f"tests/{room}", *_naming(rf"offsite\.{room}\.", "tests/contracts")]


def _naming(pattern: str, folder: str) -> list[str]:
    names, paths = re.compile(pattern), sorted((ROOT / folder).rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if names.search(path.read_text(encoding="utf-8"))]


def judged(mutant: Mutant) -> str:
    """Returns whether the tests notice a change in the copy of the tree."""
    path = TREE / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(mutant.text, encoding="utf-8")
    module = "offsite." + mutant.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    try:
        if _run(["-c", f"import {module}"]) != 0:
            return NONE
        options = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", LEFT_OUT]
        return UNNOTICED if all(_run([*options, *names]) == 0 for names in tests_of(mutant.file)) else NOTICED
    finally:
        path.write_text(original, encoding="utf-8")


def _run(arguments: list[str]) -> int | None:
    """Returns the exit code of Python in the copy of the tree; None where it takes too long."""
    environment = os.environ | {"PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.run(
            [sys.executable, *arguments], cwd=TREE, env=environment, timeout=TEST_SECONDS, check=False, **quiet
        ).returncode
    except subprocess.TimeoutExpired:
        return None


def copy_tree() -> None:
    """Copies the files of the repository, as they are now, to where they are changed."""
    shutil.rmtree(TREE, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (TREE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, TREE / name, follow_symlinks=False)


def report(chosen: list[Mutant], say: Callable[[str], None], until: float) -> None:
    """Judges changes until a time, and says each result, each change that was not noticed, and the score."""
    results: Counter[tuple[str, str]] = Counter()
    for number, mutant in enumerate(chosen, start=1):
        if time.monotonic() > until:
            say(f"time is up after {number - 1} of {len(chosen)}")
            break
        result = judged(mutant)
        results[next(room for room in ROOMS if mutant.file.startswith(f"{room}/")), result] += 1
        say(f"{number}/{len(chosen)} {mutant.file}:{mutant.line} {result}")
        if result == UNNOTICED:
            before = (TREE / mutant.file).read_text(encoding="utf-8").splitlines()
            lines = difflib.unified_diff(before, mutant.text.splitlines(), lineterm="", n=1)
            say("\n".join(f"    {line}" for line in list(lines)[2:]))
    for room in ROOMS:
        noticed, missed = results[room, NOTICED], results[room, UNNOTICED]
        if noticed + missed:
            say(f"{room}: {noticed} of {noticed + missed} noticed ({100 * noticed / (noticed + missed):.0f} %)")


def main() -> None:
    """Reads the command line, and judges the changes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="draws the same changes from the same code")
    parser.add_argument("--count", type=int, default=100, help="number of changes")
    parser.add_argument("--skip", type=int, default=0, help="number of changes that were judged before")
    parser.add_argument("--minutes", type=float, default=240.0, help="begin no further change after so long")
    given = parser.parse_args()
    copy_tree()
    until = time.monotonic() + 60 * given.minutes
    report(sample(given.seed, given.count)[given.skip :], lambda text: print(text, flush=True), until)


if __name__ == "__main__":
    main()
