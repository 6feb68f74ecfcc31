"""A program of Flower's as a child process: quiet, logged to a file, and ended with its parent."""

import contextlib
import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from offsite.protos.proxies import without_proxies

# By default Flower reports usage, asks for updates and installs what a bundle lists.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # bytes of one piece of a long message: 20 seconds at 50 kB/s, and Flower's time limit is for one piece
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(1 << 20),
}
STOP_SECONDS = 2.0
OPEN_FILES = 1 << 16
LAST_BYTES = 1 << 14
# How Flower 1.41 writes starts and errors into its log.
_COLOUR, _STARTED = re.compile(r"\x1b\[[0-9;]*m"), "Started server process"
_WEB_SERVER = re.compile(r"INFO: {5}")  # uvicorn's own lines, which say at each end alike that it shuts down
_CODE, _ERROR = re.compile(r"\[code: \d+\]"), re.compile(r"\b(?:ERROR|CRITICAL|\w*Error:)")
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PARENT = 1, 4, "OFFSITE_PARENT"


class FlowerProcess:
    """One child process, started and stopped.

    Args:
      module: Python module to run.
      arguments: command line of the module; never a secret.
      log: file for the process' output.
      home: folder for Flower's own files.
      environment: variables in addition to the inherited ones, of which those about proxies are left out.
    """

    def __init__(
        self, module: str, arguments: list[str], *, log: Path, home: Path, environment: Mapping[str, str]
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._log, self._home = log, home
        # a program that only moves bytes has no use for torch's threads
        self._environment = QUIET | {"FLWR_HOME": str(home), "OMP_NUM_THREADS": "1"} | dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id; None when the process does not run."""
        return self._process.pid if self.running and self._process else None

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the process, which ends with its parent, also when the parent is killed."""
        self._home.mkdir(parents=True, exist_ok=True)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # No preexec_fn: it makes Python fork, and gRPC's threads and fork handlers come along into the child.
                env=without_proxies(os.environ) | self._environment | {_PARENT: str(os.getpid())},
                cwd=self._home,
            )

    def stop(self) -> None:
        """Ends the process: politely, and by force after `STOP_SECONDS`."""
        if self._process is None or not self.running:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def reason(self, signs: Collection[str] = ()) -> str:
        """Returns why the process ended, from the end of its log: its last error, or else its last line with a sign.

        Args:
          signs: words that say why. Behind the line with the reason come others, as that the process shuts down, and
            how many of them are written already depends on the moment; without a sign the last of them is returned.
        """
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - LAST_BYTES))
                lines = _COLOUR.sub("", log.read().decode(errors="replace")).strip().splitlines()
        except OSError:
            return ""
        lines = lines[max((i for i, line in enumerate(lines) if _STARTED in line), default=0) :]
        errors = [line.strip() for line in lines if _CODE.match(line) or _ERROR.search(line)]
        told = [line.strip() for line in lines if any(sign in line for sign in signs)]
        own = [line.strip() for line in lines if line.strip() and not _WEB_SERVER.match(line)]
        return (errors or told or own or [""])[-1]


def die_with_parent() -> None:
    """Makes this process end with its parent, also when the parent is killed; called by the child."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(_PARENT, str(os.getppid())) != str(os.getppid()):
        sys.exit("the parent process ended before this one had begun")


def forbid_core_dumps() -> None:
    """Keeps the memory of this process, with its keys and records, out of files that a crash would leave.

    A limit of 0 does not keep a core from a program that the system hands cores to; the second way does, on Linux, and
    also keeps other processes of this user from attaching. Children inherit the first way only.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)


def allow_open_files(limit: int = OPEN_FILES) -> None:
    """Lets this process and its children hold up to `limit` connections and files, as far as its hard limit permits.

    Strangers who connect and send nothing use up a shell's soft limit of 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(ValueError, OSError):  # macOS has a lower limit of its own; then the old limit stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
