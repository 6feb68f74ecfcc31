"""Starts the tokenizer's program and asks it about records; each record gets a process and limits of its own.

Nothing that happens to a record may change the result of another: a coordinator that writes a tokenizer would otherwise
turn one record into a switch for all others, and noise is planned for one record. So the program reads the tokenizer,
and then becomes a copy of itself for each record (fork). The copy starts from the same memory, reads the record,
answers and ends. The limits are CPU time and memory of that copy, so neither a busy machine nor an earlier record uses
them up, and no limit counts over records. The price is a few milliseconds for each record, and N slow records take N
limits of time: the owner may stop the job by hand, and nothing here stops it.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 60.0  # wall time for reading the tokenizer; no record is involved
CPU_SECONDS, BYTES_PER_SECOND = 10, 50_000  # CPU time of one record: a constant, and more for a longer record
IDLE_FACTOR = 10  # a record's process that waits without end, as for a lock, ends after so many times its CPU time
REAP_SECONDS = 30.0  # wall time beyond that, after which the whole program is taken for stuck
_PROGRAM = Path(__file__).with_name("tokenizer_process.py")
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
FINE, FAILED, STOPPED = range(3)  # outcomes of a record, as `tokenizer_process` sends them


@dataclass
class Outcomes:
    """How a tokenizer did on records; for the log of the site only, since the numbers follow from the records.

    Attributes:
      failed: number of records on which the tokenizer failed or ran out of memory.
      stopped: number of records that were stopped at their own limit of time.
    """

    failed: int = 0
    stopped: int = 0

    def count(self, outcome: int) -> int:
        """Counts the outcome of one record, and returns how many were stopped so far where this one was, else 0."""
        self.failed += outcome == FAILED
        self.stopped += outcome == STOPPED
        return self.stopped if outcome == STOPPED else 0


class TokenizerWorker:
    """The running program of one tokenizer; a context manager.

    Args:
      start: tokenizer.json, and the settings as JSON.

    Attributes:
      facts: facts about the tokenizer, as the program sends them.

    Raises:
      OSError, EOFError, ValueError: the program cannot be started, or cannot read the tokenizer.
    """

    def __init__(self, start: Sequence[bytes]) -> None:
        self._start = start
        self.facts: Mapping[str, Any] = {}

    def __enter__(self) -> "TokenizerWorker":
        self._control, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603 - our own file
                    [sys.executable, "-I", str(_PROGRAM)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # a panic's message quotes the text
                    env=_ENVIRONMENT,
                    process_group=0,
                )
        except BaseException:
            self._control.close()
            raise
        try:
            self._control.settimeout(START_SECONDS)
            for content in self._start:
                self._control.sendall(struct.pack("<I", len(content)) + content)
            (size,) = struct.unpack("<I", _taken(self._control, 4))
            self.facts = json.loads(_taken(self._control, size))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is the program and its copy
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def ask(self, request: Mapping[str, Any], most: int) -> tuple[list[int], int]:
        """Returns the numbers that a copy of the program answers to a request, and its outcome.

        The numbers are an empty list unless the outcome is `FINE`.

        Args:
          request: request as JSON; see `tokenizer_process`.
          most: number of numbers that fit; a longer answer counts as a failure.
        """
        content = json.dumps(request).encode()
        seconds = CPU_SECONDS + len(content) // BYTES_PER_SECOND
        try:
            answer, outcome = self._exchange(content, seconds, 4 * most)
        except (OSError, EOFError):  # the program itself is gone, which no record can cause by its content alone
            self.__exit__()
            self.__enter__()
            return [], FAILED
        if outcome != FINE or len(answer) % 4 or len(answer) > 4 * most:
            return [], outcome or FAILED
        words = array("I", answer)
        if sys.byteorder == "big":
            words.byteswap()
        return words.tolist(), FINE

    def _exchange(self, content: bytes, seconds: int, most: int) -> tuple[bytes, int]:
        """Returns the answer of one copy, at most `most` + 1 bytes, and its outcome; the copy has ended."""
        until = time.monotonic() + IDLE_FACTOR * seconds + REAP_SECONDS
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                terms = struct.pack("<II", seconds, IDLE_FACTOR * seconds)
                socket.send_fds(self._control, [terms], [theirs.fileno()])
            answer = bytearray()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the outcome says why
                ours.settimeout(max(until - time.monotonic(), 0.001))
                ours.sendall(struct.pack("<I", len(content)) + content)
                while len(answer) <= most:
                    ours.settimeout(max(until - time.monotonic(), 0.001))
                    piece = ours.recv(min(most + 1 - len(answer), 1 << 20))
                    if not piece:
                        break
                    answer += piece
        self._control.settimeout(max(until - time.monotonic(), 0.001))
        return bytes(answer), _taken(self._control, 1)[0]


def _taken(connection: socket.socket, size: int) -> bytes:
    """Returns exactly `size` bytes from a connection; raises EOFError where the peer ends before."""
    taken = bytearray()
    while len(taken) < size:
        piece = connection.recv(min(size - len(taken), 1 << 20))
        if not piece:
            raise EOFError("tokenizer: its process has ended")
        taken += piece
    return bytes(taken)
