"""The script for GPUs, where there is none: it says so, runs nothing, and hides no section that failed."""

from pathlib import Path

import pytest
import torch

from bench import gpu


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_without_a_gpu_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == gpu.EXIT_NO_DEVICE == 2
    assert "finds no GPU here, so nothing was run" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_section_that_failed_or_ran_out_of_time_is_in_the_table(tmp_path: Path) -> None:
    arguments = gpu._arguments(["--small"])
    late = gpu.run_section("site", arguments, "cpu", tmp_path, 0.0)
    assert late == {"not_finished": "within 0 s", "bar": False}
    failed = {"failed": "DataError: no run folder", "bar": False}
    lines = gpu.table({"job": late, "site": failed, "equal": {"equal": True, "bar": True, "wall_seconds": 3.0}})
    assert [line.split()[2] for line in lines.splitlines()[1:]] == ["MISSED", "MISSED", "met"]
    assert "not finished within 0 s" in lines
    assert "failed: DataError: no run folder" in lines
