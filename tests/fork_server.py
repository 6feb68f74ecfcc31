"""A process that has imported what the programs need; each process that a test starts is a fork of it.

A message on its socket is a program with its arguments, environment and folder, and four descriptors: standard input,
output and error of the new process, and a pipe that takes its exit code. The answer is a process id.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MESSAGE_BYTES = 1 << 17
EXIT_UNFLUSHED = 120  # as Python's own, where standard output cannot be written
ENDED: list[int] = []  # the exit code of this fork, once its program has one
FORK_SAFE = {"jemalloc_bg_thd"}  # of an allocator in pyarrow, which looks after its thread at a fork by itself
ROOMS = ("cli", "client", "coordinator", "simulation")  # every module of them; these load the other rooms
MAIN = "offsite.cli.main"  # runs in a fork as `__main__`, so no fork has it under this name before
# What transformers loads late, for the tests' tiny model.
LATE = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)
# Noise that most jobs of the tests need, so that it is searched for once and not by every site: epsilon, delta and
# sample rate of a site with 100 records and batches of 8, and the steps of 1 to 3 rounds, and of 3 with 40 spare.
TINY_WORLD, CALIBRATED = (8.0, 1e-6, 8 / 100), (1, 2, 3, 43)


@dataclass(frozen=True)
class Start:
    """A program as `python -m` is given it."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    folder: str


@dataclass
class Running:
    """The forks that still run: by process descriptor, the process id and the pipe for the exit code."""

    processes: dict[int, tuple[int, int]] = field(default_factory=dict)

    def reap(self, descriptor: int) -> None:
        """Passes the exit code of a fork on, in the form of `subprocess`."""
        pid, result = self.processes.pop(descriptor)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(BrokenPipeError):  # the test that started it may be gone
            os.write(result, os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
        os.close(descriptor)
        os.close(result)

    def end(self) -> None:
        """Kills what still runs."""
        for pid, _ in self.processes.values():
            os.kill(pid, signal.SIGKILL)
        for descriptor in list(self.processes):
            self.reap(descriptor)


def own_modules() -> Iterator[str]:
    """Yields the modules of the program, so that no list of them grows old here."""
    for room in ROOMS:
        package = importlib.import_module(f"offsite.{room}")
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.name != MAIN:
                yield found.name


def preload() -> None:
    """Imports everything; raises where something of it has started a thread, which no fork would have."""
    from offsite.protos.flower_process import QUIET

    os.environ.update(QUIET)  # as the programs do, before anything of Flower's is imported
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name in (*own_modules(), *LATE):
        importlib.import_module(name)
    from offsite.privacy.calibrate import calibrated

    for steps in CALIBRATED:
        calibrated(*TINY_WORLD, steps, "pld")
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")} - FORK_SAFE
    if len(threads) != 1 or threading.active_count() != 1:
        raise RuntimeError(f"threads={sorted(threads)}: an import has started one, which a fork would not have")
    gc.collect()
    gc.freeze()  # so that the forks go on sharing these pages


def serve(control: socket.socket) -> Start | None:
    """Forks for each message; returns in each fork with its start, and here with None once nobody listens any more."""
    running = Running()
    while True:
        ready, _, _ = select.select([control, *running.processes], [], [])
        for descriptor in ready:
            if descriptor is not control:
                running.reap(descriptor)
        if control not in ready:
            continue
        content, given, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 4)
        if not content:
            running.end()
            return None
        *standard, result = given
        pid = os.fork()
        if pid == 0:
            for number, one in enumerate(standard):
                os.dup2(one, number)
            inherited = [number for pair in running.processes.items() for number in (pair[0], pair[1][1])]
            for one in (*given, *inherited, control.detach()):
                os.close(one)
            return Start(**json.loads(content))
        for one in standard:
            os.close(one)
        running.processes[os.pidfd_open(pid)] = (pid, result)
        control.send(str(pid).encode())


def become(start: Start, on_interrupt: Any) -> None:
    """Gives a fork what a new interpreter would have of its own, and runs the program in it as `python -m` does."""
    signal.signal(signal.SIGINT, on_interrupt)
    os.environ.clear()
    os.environ.update(start.environment)
    os.chdir(start.folder)
    fresh_randomness()
    sys.argv = [start.module, *start.arguments]
    try:
        runpy.run_module(start.module, run_name="__main__", alter_sys=True)
        ENDED.append(0)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            ENDED.append((ended.code or 0) & 0xFF)
        raise


def end() -> None:
    """Ends a fork after every other exit function; taking 4,500 modules apart would copy all pages that are shared.

    Without a code in `ENDED`, as after an exception, the interpreter goes its usual way.
    """
    if ENDED:
        code = ENDED[0]
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            code = EXIT_UNFLUSHED
        os._exit(code)


def fresh_randomness() -> None:
    """Seeds NumPy's global generator anew; Python reseeds its own at a fork, and torch's begins with a constant."""
    import numpy as np

    np.random.seed(None)
    random.seed()


def main(descriptor: int) -> None:
    """Serves one test process until it is gone."""
    atexit.register(end)  # the first, so that it is called last
    # Ctrl-C is meant for the tests, which end this process by closing the socket.
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    preload()
    control = socket.socket(fileno=descriptor)
    control.send(b"ready")
    start = serve(control)
    if start is not None:
        become(start, on_interrupt)


if __name__ == "__main__":
    main(int(sys.argv[1]))
