"""The status of a job: a new process with the number of a dead coordinator does not count as the coordinator."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.home.status import ENDED, Status, born, is_running, read_status
from offsite.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
BOOT, OTHER = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"


def written(folder: Path, **changed: Any) -> Path:
    """The status of this very process in a round, with some facts changed; None removes a fact."""
    Status(folder / "status.json", lambda: NOW).set("in a round")
    facts = json.loads((folder / "status.json").read_text()) | changed
    (folder / "status.json").write_text(json.dumps({key: one for key, one in facts.items() if one is not None}))
    return folder / "status.json"


def healthy(folder: Path) -> bool:
    command = [sys.executable, "-I", str(ROOT / "deploy" / "healthcheck.py"), "coordinator", str(folder)]
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0


def processes(folder: Path, *, boot: str = BOOT, start: int = 500, name: str = "python") -> Path:
    """A folder like /proc with one process, 7, as `proc_pid_stat(5)` describes it."""
    (folder / "sys/kernel/random").mkdir(parents=True)
    (folder / "sys/kernel/random/boot_id").write_text(f"{boot}\n")
    (folder / "7").mkdir()
    (folder / "7/stat").write_text(f"7 ({name}) S 1 " + " ".join(["0"] * 17) + f" {start} 1 2 3\n")
    return folder


def test_a_running_coordinator_is_running(tmp_path: Path) -> None:
    assert read_status(written(tmp_path))["state"] == "in a round"
    assert healthy(tmp_path)


def test_its_birth_is_the_one_that_the_system_tells() -> None:
    began = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(os.getpid())], capture_output=True, text=True, timeout=30, check=False
    )
    boot, ticks = born(os.getpid()).split()
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with Path("/proc/stat").open() as file:
        up = next(int(line.split()[1]) for line in file if line.startswith("btime"))
    if began.returncode == 0:
        told = datetime.strptime(began.stdout.strip(), "%a %b %d %H:%M:%S %Y").astimezone()
        assert abs(up + int(ticks) / os.sysconf("SC_CLK_TCK") - told.timestamp()) < 3


def test_another_process_with_its_number_is_not_it(tmp_path: Path) -> None:
    """Number 1 is there on every machine; after a restart of a container it often is the number of the coordinator."""
    boot, ticks = born(os.getpid()).split()
    for other in (f"{OTHER} {ticks}", f"{boot} {int(ticks) - 1}"):
        assert read_status(written(tmp_path, born=other))["state"] == "killed"
        assert not healthy(tmp_path)


def test_a_process_that_is_gone_is_gone(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for birth in ("", None, born(os.getpid())):
        assert read_status(written(tmp_path, pid=ended.pid, born=birth))["state"] == "killed"
        assert not healthy(tmp_path)


@pytest.mark.parametrize("birth", ["", None])
def test_a_status_without_a_birth_is_judged_by_the_number(tmp_path: Path, birth: str | None) -> None:
    """Such a status comes from an earlier release, or from macOS."""
    assert read_status(written(tmp_path, born=birth))["state"] == "in a round"
    assert healthy(tmp_path)


@pytest.mark.parametrize("name", ["python", "a) b", "((", ") S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21"])
def test_any_name_of_a_program_is_read_over(tmp_path: Path, name: str) -> None:
    folder = processes(tmp_path / "proc", name=name)
    assert born(7, folder) == f"{BOOT} 500"
    assert is_running(7, f"{BOOT} 500", folder)
    assert not is_running(7, f"{BOOT} 501", folder)
    assert not is_running(7, f"{OTHER} 500", folder)
    assert not is_running(8, f"{BOOT} 500", folder)


def test_what_may_not_be_read_is_not_taken_for_dead(tmp_path: Path) -> None:
    """With hidepid a monitor of another user sees that there is a process, and no more."""
    folder = processes(tmp_path / "proc")
    (folder / "7/stat").unlink()
    assert is_running(7, f"{BOOT} 500", folder)


def test_without_proc_the_number_decides(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert is_running(os.getpid(), "", nowhere)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not is_running(ended.pid, "", nowhere)
    assert born(os.getpid(), nowhere) == ""


@pytest.mark.parametrize("state", ENDED)
def test_an_end_needs_no_process(tmp_path: Path, state: str) -> None:
    assert read_status(written(tmp_path, state=state, born=f"{OTHER} 1"))["state"] == state


def test_where_no_job_was_started(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no job was started here"):
        read_status(tmp_path / "status.json")
