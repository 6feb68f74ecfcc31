"""The bench's numbers from lines whose answer is known: transfer, leak, ranks, harm, and the report that is written."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.emulator_report import interval, transfer, write_report


def emulator(name: str, cosine: float, public_loss: float) -> dict[str, Any]:
    sizes = {"bytes": 50, "full_bytes": 100, "middle_ratio": 0.4, "compute_ratio": 0.5, "verbatim": 0.1}
    words = {"key": f"emulator|{name}", "name": name, "shape": "sandwich", "recipe": ["int4:64"]}
    return {**words, **sizes, "cosine": cosine, "public_loss": public_loss, "cpu_seconds": 3.0}


def case(
    name: str, domain: str, plug_in: float, *, zero: float = 4.0, tuned: float = 3.0, **more: Any
) -> dict[str, Any]:
    losses = {"zero_shot": zero, "slot_tuned": tuned, "plug_in": plug_in, "taken": min(plug_in, zero)}
    key = f"case|{name}|{domain}|0"
    return {"key": key, "name": name, "domain": domain, "seed": 0, "emulator_tuned": 5.0, **losses, **more}


def test_transfer_takes_means_first_and_the_ratio_after() -> None:
    """A case in which little could be gained does not decide."""
    cases = [case("a", "x", 3.5), case("a", "y", 2.0, zero=3.0, tuned=2.9)]
    assert transfer(cases) == pytest.approx((3.5 - 2.75) / (3.5 - 2.95))
    assert transfer(cases, "slot_tuned") == 1
    assert transfer(cases, "zero_shot") == 0
    low, high = interval(cases)
    assert low <= transfer(cases) <= high
    assert interval([case("a", "x", 3.5)] * 4) == (0.5, 0.5)


def test_the_report_of_a_run_whose_answer_is_known(tmp_path: Path) -> None:
    gains = {"good": 3.1, "fair": 3.4, "poor": 3.9, "bad": 4.03}
    cosines = {"good": 0.9, "fair": 0.3, "poor": 0.5, "bad": -0.1}  # one pair the wrong way round
    lines: list[dict[str, Any]] = [emulator(name, cosines[name], 4 + place) for place, name in enumerate(gains)]
    lines += [case(name, domain, plug_in) for name, plug_in in gains.items() for domain in ("x", "y")]
    lines[4] |= {"relearned": {"10000": 3.5}}
    lines += [
        emulator("not measured", 0.7, 9.0),
        {"key": "reference|sandwich|x|0", "zero_shot": 4.0, "slot_tuned": 3.0},
    ]
    write_report(tmp_path, "a model", lines)
    found = json.loads((tmp_path / "report.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == list(gains)
    assert {name: row["G"] for name, row in rows.items()} == pytest.approx(
        {"good": 0.9, "fair": 0.6, "poor": 0.1, "bad": -0.03}
    )
    assert rows["bad"]["taken"] == 0
    assert rows["good"]["L"] == -1
    assert rows["good"]["relearned"] == {"10000": 0.5}
    # Spearman by its definition, 1 - 6 sum d^2 / (n (n^2 - 1)): two of four have changed places.
    assert found["predictor"]["cosine"] == pytest.approx({"x": 0.8, "y": 0.8})
    assert found["predictor"]["public_loss"] == pytest.approx({"x": 1.0, "y": 1.0})
    assert found["predictor"]["public"] == {}
    assert found["harm"] == {"cases": 8, "plug_in": ["case|bad|x|0", "case|bad|y|0"], "taken": []}
    text = (tmp_path / "report.md").read_text()
    assert "| good | 0.500 | 0.400 | 0.50 | 0.90 | 0.900 | 0.90 to 0.90 | 0.90 | 0.90 | -1.00 | 10k 0.50 | 3 |" in text
    assert "2 of 8 as they came, 0 as the coordinator takes them" in text
    assert "not measured" not in text
    assert (tmp_path / "report.png").stat().st_size > 1000
