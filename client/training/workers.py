"""Further processes of a site that take shares of each training step, started and ended by the process that trains.

Between the processes there is one pair of connected sockets each, without a name or a port: no other user and no other
machine can reach it, which cannot be said of torch.distributed's store. Only sums in float64 travel, and they are added
on the CPU whatever the device, so there is nothing that a collective of NCCL would be faster at.
"""

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from offsite.client.training.worker_messages import Beginning, Failed, Opening, Ready, Step, receive, send
from offsite.emulator.runtime.weight_forms import NEVER
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.errors import (
    ConfigError,
    DataError,
    DigestMismatch,
    MalformedMessage,
    PrivacyRefusal,
    RangeError,
    TrainingFault,
    UnsupportedModel,
)
from offsite.privacy.batches import Batch
from offsite.privacy.shares import Share, State
from offsite.protos.job_manifest import JobManifest
from offsite.protos.proxies import without_proxies
from offsite.task.number_format import FLOAT32

PROGRAM = "offsite.client.training.worker_program"
STOP_SECONDS = 2.0
_KINDS: Mapping[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        ConfigError,
        DataError,
        DigestMismatch,
        MalformedMessage,
        MemoryError,
        PrivacyRefusal,
        RangeError,
        UnsupportedModel,
    )
}


class Workers:
    """The workers of one session; the training process itself is none of them.

    Args:
      opening: emulator, with the number of threads of each process.
      devices: device of each worker.

    Raises:
      OffsiteError, MemoryError: a worker cannot load the emulator; no worker is left.
    """

    def __init__(self, opening: Opening, devices: Sequence[torch.device]) -> None:
        self._threads = opening.threads
        self._workers = [WorkerProcess(opening, device) for device in devices]
        try:
            self._ready()
        except BaseException:
            self.close()
            raise

    @classmethod
    def beside(
        cls,
        folder: Path,
        manifest: JobManifest,
        *,
        emulator: str,
        limits: VettingThresholds,
        weights: str,
        devices: Sequence[torch.device],
        dtype: str = FLOAT32,
        recompute: str = NEVER,
    ) -> "Workers | None":
        """Starts the workers beside a session that this process has opened and vetted; None for one device.

        Args:
          folder: folder of the package.
          manifest: manifest of the job.
          emulator: SHA-256 of the package, hexadecimal.
          limits: thresholds of the vetting.
          weights: form in which frozen weights lie in memory.
          devices: device of each process, this process first. The processes share the processor's threads.
          dtype: number format in which the session trains.
          recompute: whether activations of frozen blocks are computed again, see `SiteSettings.recompute`.
        """
        if len(devices) == 1:
            return None
        threads = max(1, torch.get_num_threads() // len(devices))
        opening = Opening(
            folder, manifest.to_bytes(), emulator, limits, weights, threads, dtype=dtype, recompute=recompute
        )
        return cls(opening, devices[1:])

    def begin(self, beginning: Beginning) -> tuple["WorkerProcess", ...]:
        """Begins a training at all workers, and returns these; one that has ended is started again.

        Raises:
          OffsiteError, MemoryError: a worker cannot load the emulator.
        """
        self._ready()
        for worker in self._workers:
            worker.begin(beginning)
        return tuple(self._workers)

    @contextmanager
    def own_threads(self) -> Iterator[None]:
        """Keeps the calling thread, while it trains, to its share of the processor's threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def close(self) -> None:
        """Ends all workers; a second time changes nothing."""
        for worker in self._workers:
            worker.stop()

    def _ready(self) -> None:
        for worker in self._workers:
            worker.start()
        for worker in self._workers:
            worker.settle()


class WorkerProcess:
    """One worker, as `privacy.shares.Worker` describes it.

    Args:
      opening: emulator, with the number of threads.
      device: device of the worker.

    Attributes:
      process: the running process; None before the first start.
    """

    def __init__(self, opening: Opening, device: torch.device) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._opening = dataclasses.replace(opening, device=str(device))
        self._connection: Connection | None = None
        self._owed: list[type] = []  # kinds of the messages whose answers were not read yet

    def start(self) -> None:
        """Starts the process and lets it load the emulator, unless it runs."""
        if self.process is not None and self.process.poll() is None and self._connection is not None:
            return
        self.stop()
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-P", "-m", PROGRAM, str(theirs.fileno())],  # -P: no module from the current folder
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=without_proxies(os.environ) | {"OMP_NUM_THREADS": str(self._opening.threads)},
                pass_fds=[theirs.fileno()],
            )
        self._connection = Connection(ours.detach())
        self._send(self._opening)

    def settle(self) -> None:
        """Waits until the worker is idle: loaded, and through with the steps of a training that failed elsewhere.

        Raises:
          OffsiteError, MemoryError: the worker cannot load the emulator, or has ended.
        """
        while self._owed:
            asked, reply = self._owed[0], self._receive()
            if asked is Opening and isinstance(reply, Failed):
                self.stop()
                raise self._error(reply)

    def begin(self, beginning: Beginning) -> None:
        """Begins a training, without waiting for it; where it fails, its first step says why."""
        self._send(beginning)

    def send(self, state: State, records: Batch) -> None:
        """See `privacy.shares.Worker`."""
        self._send(Step(state, records))

    def receive(self) -> Share:
        """See `privacy.shares.Worker`."""
        while True:
            match self._receive():
                case Failed() as failed:
                    raise self._error(failed)
                case Share() as share:
                    return share
                case Ready():  # the answer to `begin`
                    continue

    def stop(self) -> None:
        """Ends the process; a second time changes nothing."""
        if self._connection is not None:
            self._connection.close()
        self._connection, self._owed = None, []
        if self.process is not None and self.process.poll() is None:
            self.process.kill()  # it holds nothing that has to be put down
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)

    def _send(self, message: Opening | Beginning | Step) -> None:
        try:
            send(self._open_connection(), message)
        except OSError:
            raise self._ended() from None
        self._owed.append(type(message))

    def _receive(self) -> Any:
        try:
            reply = receive(self._open_connection())
        except (EOFError, OSError):
            raise self._ended() from None
        self._owed.pop(0)
        return reply

    def _open_connection(self) -> Connection:
        if self._connection is None:
            raise OSError
        return self._connection

    def _ended(self) -> TrainingFault:
        """Ends what is left of a worker whose connection broke, and returns the error that says so."""
        code = None
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(STOP_SECONDS)
        self.stop()
        return TrainingFault(
            f"worker on device={self._opening.device} ended by itself, exit code {code}; where the system ended it "
            "for its memory, set processes lower in site.toml, then run again"
        )

    def _error(self, failed: Failed) -> Exception:
        """Returns a worker's error as the error of this process."""
        kind = _KINDS.get(failed.kind, TrainingFault)
        return kind(f"worker on device={self._opening.device}: {failed.reason}")
