"""Reports and round records are typed: no code looks up a key in quotes, and no dictionary stands for a record."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TYPED = (
    "coordinator/report",
    "coordinator/rounds",
    "coordinator/job",
    "coordinator/service.py",
    "simulation",
    "cli/display.py",
    "cli/main.py",
)
# No keys of a report: other files of the run, whose shape the same module writes and checks; names of types; Flower's.
OTHER_KEYS = {
    "cli/display.py": 2,
    "coordinator/job/store.py": 9,
    "coordinator/rounds/attempt.py": 5,
    "simulation/flower_engine.py": 1,
}
MAX_UNTYPED = 15


def sources(*places: str) -> list[Path]:
    found = [ROOT / place for place in places]
    return sorted(p for one in found for p in (one.rglob("*.py") if one.is_dir() else [one]))


def looked_up(tree: ast.AST) -> int:
    """Counts the subscripts with a key in quotes."""
    return sum(
        isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
        for node in ast.walk(tree)
    )


def untyped(tree: ast.AST) -> int:
    """Counts `dict[str, Any]` and `Mapping[str, Any]`."""
    return sum(
        isinstance(node, ast.Subscript) and ast.unparse(node) in ("dict[str, Any]", "Mapping[str, Any]")
        for node in ast.walk(tree)
    )


def test_no_key_of_a_report_is_looked_up_by_its_name() -> None:
    found = {str(p.relative_to(ROOT)): looked_up(ast.parse(p.read_text())) for p in sources(*TYPED)}
    assert {name: count for name, count in found.items() if count} == OTHER_KEYS


def test_few_dictionaries_of_anything_are_left() -> None:
    found = {
        str(p.relative_to(ROOT)): untyped(ast.parse(p.read_text())) for p in sources("coordinator", "cli", "simulation")
    }
    assert sum(found.values()) < MAX_UNTYPED, {name: count for name, count in found.items() if count}


@pytest.mark.parametrize(
    ("code", "keys", "dictionaries"),
    [
        ("def f(report: dict[str, Any]) -> int:\n    return report['privacy']['sites'][0]['steps']", 3, 1),
        ("def f(report: Mapping[str, Any]) -> None:\n    rounds = report['rounds']", 1, 1),
        ("def f(report: Report) -> int:\n    return report.privacy.sites[0].steps + [1][0]", 0, 0),
    ],
)
def test_both_counts_find_what_they_look_for(code: str, keys: int, dictionaries: int) -> None:
    assert looked_up(ast.parse(code)) == keys
    assert untyped(ast.parse(code)) == dictionaries
