"""Starts forks of the fork server, with the interface of `subprocess.Popen` as far as tests use it."""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
READY_SECONDS, COMMAND_SECONDS = 600.0, 600.0
PROGRAM = "offsite.cli.main"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class ForkServer:
    """The fork server of this test process; every start has the same environment, since imports read much of it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=ENVIRONMENT | {"GRPC_ENABLE_FORK_SUPPORT": "0"},
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
            )
        self._socket.settimeout(READY_SECONDS)
        if self._socket.recv(5) != b"ready":
            raise RuntimeError("the fork server has ended; what it wrote on standard error says why")

    def close(self) -> None:
        """Ends the server, and with it every fork that still runs."""
        self._socket.close()
        self.process.wait()

    def start(self, module: str, arguments: list[str], *, output: IO[bytes], errors: IO[bytes]) -> "Forked":
        """Starts `python -m MODULE ARGUMENTS` with nothing on its standard input."""
        start = {"module": module, "arguments": arguments, "environment": ENVIRONMENT, "folder": str(Path.cwd())}
        result, theirs = os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY)
        try:
            given = [nothing, output.fileno(), errors.fileno(), theirs]
            socket.send_fds(self._socket, [json.dumps(start).encode()], given)
            return Forked(int(self._socket.recv(20)), result)
        finally:
            os.close(nothing)
            os.close(theirs)


class Forked:
    """A process that the fork server has started.

    Args:
      pid: its process id.
      result: pipe by which the server tells its exit code.
    """

    def __init__(self, pid: int, result: int) -> None:
        self.pid, self._result = pid, result
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal, None while it runs."""
        return self._result_within(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code.

        Raises:
          subprocess.TimeoutExpired: it still runs.
        """
        code = self._result_within(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def _result_within(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._result], [], [], seconds)[0]:
            told = os.read(self._result, 4)
            os.close(self._result)
            if len(told) != 4:
                raise RuntimeError(f"process {self.pid}: the fork server has ended without its exit code")
            self.returncode = int.from_bytes(told, "big", signed=True)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)


Process = subprocess.Popen[bytes] | Forked


@cache
def server() -> ForkServer:
    """Returns the server of this test process, started when the first test asks for it."""
    made = ForkServer()
    atexit.register(made.close)
    return made


def launch(
    module: str,
    *arguments: str,
    output: IO[bytes],
    errors: IO[bytes],
    env: dict[str, str] | None = None,
    plain: bool = False,
) -> Process:
    """Starts `python -m MODULE ARGUMENTS`: as a fork, or plainly, and that is as a new interpreter."""
    if plain or env is not None or not sys.platform.startswith("linux"):
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, stdout=output, stderr=errors, env=env or ENVIRONMENT)
    return server().start(module, list(arguments), output=output, errors=errors)


def offsite(*arguments: str, fails: bool = False, plain: bool = False) -> str:
    """Runs one command to its end and returns what it printed."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = launch(PROGRAM, *arguments, output=output, errors=errors, plain=plain)
        try:
            code = process.wait(timeout=COMMAND_SECONDS)
        finally:
            process.kill()
        printed = ""
        for file in (output, errors):
            file.seek(0)
            printed += file.read().decode()
    assert (code != 0) == fails, printed
    return printed
