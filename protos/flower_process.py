"""A program of Flower's as a child process: quiet, logged to a file, and gone when its parent is."""

import contextlib
import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Flower reports usage, asks for updates and installs what a bundle lists, unless told otherwise.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # pieces of a long message; at 50 kB/s one takes 20 seconds, and Flower's patience is for one piece
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(1 << 20),
}
STOP_SECONDS = 2.0
OPEN_FILES = 1 << 16
LAST_BYTES = 1 << 14
# How Flower 1.41 writes its log: what began, and what went wrong.
_COLOUR, _STARTED = re.compile(r"\x1b\[[0-9;]*m"), "Started server process"
_CODE, _ERROR = re.compile(r"\[code: \d+\]"), re.compile(r"\b(?:ERROR|CRITICAL|\w*Error:)")
_PR_SET_PDEATHSIG, _PARENT = 1, "OFFSITE_PARENT"


class FlowerProcess:
    """One child process, started and stopped.

    Args:
      module: Python module that is run.
      arguments: its command line; never a secret.
      log: file that takes what it prints.
      home: folder for Flower's own files.
      environment: variables beside the inherited ones.
    """

    def __init__(
        self, module: str, arguments: list[str], *, log: Path, home: Path, environment: Mapping[str, str]
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._log, self._home = log, home
        # torch's threads are of no use to a program that only moves bytes
        self._environment = QUIET | {"FLWR_HOME": str(home), "OMP_NUM_THREADS": "1"} | dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self.running and self._process else None

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the process; it is ended with its parent, also where that is killed."""
        self._home.mkdir(parents=True, exist_ok=True)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # No preexec_fn: with one, Python forks, and gRPC's threads and fork handlers come along into the child.
                env=os.environ | self._environment | {_PARENT: str(os.getpid())},
                cwd=self._home,
            )

    def stop(self) -> None:
        """Ends the process: politely, and after two seconds at once."""
        if self._process is None or not self.running:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def reason(self) -> str:
        """Returns why the process ended, by what it wrote last: its error, or else its last line."""
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - LAST_BYTES))
                lines = _COLOUR.sub("", log.read().decode(errors="replace")).strip().splitlines()
        except OSError:
            return ""
        lines = lines[max((i for i, line in enumerate(lines) if _STARTED in line), default=0) :]
        told = [line.strip() for line in lines if _CODE.match(line) or _ERROR.search(line)]
        return told[-1] if told else (lines[-1].strip() if lines else "")


def die_with_parent() -> None:
    """Lets this process end when the one that started it does, also where that was killed; called by the child."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(_PARENT, str(os.getppid())) != str(os.getppid()):
        sys.exit("the parent process ended before this one had begun")


def allow_open_files(most: int = OPEN_FILES) -> None:
    """Lets this process and its children hold `most` connections and files, as far as its hard limit permits.

    A shell's soft limit of 1024 is used up by strangers who connect and say nothing.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(ValueError, OSError):  # macOS has a lower limit of its own, and the old one is no error
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
