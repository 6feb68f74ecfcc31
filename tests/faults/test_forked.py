"""The fork server of the tests: each fork is a process like any other, and holds nothing of its siblings."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.conftest import wait_for
from tests.forked import ENVIRONMENT, ROOT, Forked, launch, offsite, server

LOOK = "tests.faults.look"
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks are made on Linux only")


def looked(*, plain: bool = False) -> dict[str, Any]:
    """Starts a program that prints the state of its process, and returns this state."""
    with tempfile.TemporaryFile() as output:
        process = launch(LOOK, "print", output=output, errors=output, plain=plain)
        assert process.wait(timeout=300) == 0
        output.seek(0)
        found: dict[str, Any] = json.loads(output.read())
    assert found.pop("pid") == process.pid != os.getpid()
    return found


def test_a_fork_finds_what_a_new_interpreter_finds() -> None:
    """Arguments, folder, environment, signals, open files, logging; but it has torch without an import."""
    fork, plain = looked(), looked(plain=True)
    assert (fork.pop("torch"), plain.pop("torch")) == (True, False)
    assert fork.pop("random") != plain.pop("random")
    assert fork == plain
    assert fork["environment"].items() >= ENVIRONMENT.items()
    assert fork["descriptors"] == [0, 1, 2]


def test_no_two_forks_draw_the_same() -> None:
    draws = [looked()["random"] for _ in range(3)]
    for kind in draws[0]:
        if kind != "torch":  # begins with a constant in every interpreter
            assert len({str(one[kind]) for one in draws}) == 3, kind
    assert len({one["torch"] for one in draws}) == 1


@pytest.mark.parametrize(("how", "code"), [("return", 0), ("exit", 7), ("refuse", 1), ("raise", 1)])
def test_exit_codes_are_those_of_an_interpreter(how: str, code: int) -> None:
    said = []
    for plain in (False, True):
        with tempfile.TemporaryFile() as output:
            process = launch(LOOK, how, output=output, errors=output, plain=plain)
            assert process.wait(timeout=300) == process.returncode == process.poll() == code
            output.seek(0)
            said.append(output.read().decode().strip().splitlines()[-1:])
    assert said[0] == said[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_it_and_end_it(number: signal.Signals) -> None:
    with tempfile.TemporaryFile() as output:
        process = launch(LOOK, "sleep", output=output, errors=output)
        assert isinstance(process, Forked)
        wait_for(lambda: os.fstat(output.fileno()).st_size)
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
        process.send_signal(number)
        assert process.wait(timeout=300) == -number
        assert not psutil.pid_exists(process.pid)
        process.kill()  # nothing is left to be killed


def test_a_commands_two_outputs_and_its_refusal_are_told(tmp_path: Path) -> None:
    assert "make help" not in offsite("--help")
    refusal = offsite("client", "run", str(tmp_path / "nowhere"), fails=True)
    assert refusal.startswith("offsite: folder=")
    assert refusal == offsite("client", "run", str(tmp_path / "nowhere"), fails=True, plain=True)


def test_the_server_is_one_process_for_all() -> None:
    assert server() is server()
    assert psutil.Process(server().process.pid).cwd() == str(ROOT)
