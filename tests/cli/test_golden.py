"""The tiny world's report and privacy statement are those in `tests/golden`, key by key and number by number.

They were made anew when delta became min(1e-6, 1 / (100 n)); see CHANGELOG.md.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from offsite.cli.main import app

HASH = re.compile(r"[0-9a-f]{64}")
GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@pytest.fixture(scope="module")
def folder(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("golden") / "run"
    result = CliRunner().invoke(app, ["simulate", str(fed), "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out


def steady(report: dict[str, Any]) -> dict[str, Any]:
    """Returns a report without times, memory, versions and keys, which differ from run to run."""
    cost = {phase: sorted(facts) for phase, facts in report["cost"].items()}
    rounds = [{key: value for key, value in line.items() if key != "seconds"} for line in report["rounds"]]
    provenance = {key: value if key == "seed" else "-" for key, value in report["provenance"].items()}
    return report | {"cost": cost, "rounds": rounds, "provenance": provenance}


def differences(ours: Any, golden: Any, place: str = "") -> list[str]:
    """Returns the places where two values differ; numbers may differ by another processor's arithmetic."""
    if isinstance(golden, dict) and isinstance(ours, dict):
        keys = sorted(ours.keys() ^ golden.keys())
        found = [f"{place}/{key}: in one of both only" for key in keys]
        return found + [
            d for key in ours.keys() & golden.keys() for d in differences(ours[key], golden[key], f"{place}/{key}")
        ]
    if isinstance(golden, list) and isinstance(ours, list) and len(ours) == len(golden):
        return [
            d for i, (a, b) in enumerate(zip(ours, golden, strict=True)) for d in differences(a, b, f"{place}[{i}]")
        ]
    if isinstance(golden, float) and isinstance(ours, float):
        return [] if ours == pytest.approx(golden, rel=1e-3, abs=1e-5) else [f"{place}: {ours} instead of {golden}"]
    if isinstance(golden, str) and isinstance(ours, str) and "epsilon at most" in golden:
        return []  # a sentence with a number that stands elsewhere too
    if isinstance(golden, str) and isinstance(ours, str) and HASH.fullmatch(golden) and HASH.fullmatch(ours):
        return []  # a model that another processor drew or rounded has another hash
    return [] if type(ours) is type(golden) and ours == golden else [f"{place}: {ours!r} instead of {golden!r}"]


def test_the_report_is_the_golden_one(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert differences(steady(report), json.loads((GOLDEN / "report.json").read_text())) == []


def test_the_privacy_statement_is_the_golden_one(folder: Path) -> None:
    statement = json.loads((folder / "privacy.json").read_text())
    assert differences(statement, json.loads((GOLDEN / "privacy.json").read_text())) == []


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda report: report["privacy"].pop("unit"), "/privacy/unit"),
        (lambda report: report["rounds"][0].update(accepted=False), "/rounds[0]/accepted"),
        (lambda report: report["quality"].update(gain_nats=0.1), "/quality/gain_nats"),
        (lambda report: report["secagg"].update(members=["ash"]), "/secagg/members"),
    ],
)
def test_a_report_that_differs_is_found(change: Any, place: str) -> None:
    golden, other = (json.loads((GOLDEN / "report.json").read_text()) for _ in range(2))
    change(other)
    (found,) = differences(other, golden)
    assert found.startswith(place)
