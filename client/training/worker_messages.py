"""What a training process and its workers tell each other, over a pair of sockets that nobody else has.

The messages are pickled: both ends are this release, under one user, and neither reads a byte from anywhere else.
"""

import pickle
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from offsite.emulator.runtime.refresh_state import Refresh
from offsite.emulator.runtime.weight_forms import NEVER
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.privacy.batches import Batch
from offsite.privacy.mechanism import DpSgdConfig
from offsite.privacy.shares import State
from offsite.privacy.zero_order import Directions
from offsite.task.device import CPU
from offsite.task.number_format import FLOAT32


@dataclass(frozen=True)
class Opening:
    """First message to a worker: the emulator that the site has vetted, and the place of the worker.

    Attributes:
      folder: folder of the package.
      manifest: the job's manifest, as `JobManifest.to_bytes` gives it.
      emulator: SHA-256 of the package, hexadecimal.
      limits: thresholds of the vetting.
      weights: form in which frozen weights lie in memory.
      threads: number of processor threads.
      device: name of the device.
      dtype: number format, see `task.number_format.choose_dtype`.
      recompute: whether activations of frozen blocks are computed again.
    """

    folder: Path
    manifest: bytes
    emulator: str
    limits: VettingThresholds
    weights: str
    threads: int
    device: str = CPU
    dtype: str = FLOAT32
    recompute: str = NEVER


@dataclass(frozen=True)
class Beginning:
    """Begins one training.

    Attributes:
      site: name of the site in the roster.
      number: number of the round, from 1.
      start: adapter from which the training starts, float32 (d,).
      refresh: moved biases of the emulator; () for the shipped ones.
      terms: terms of the training.
      directions: directions of a training by forward passes alone; None where gradients are taken.
    """

    site: str
    number: int
    start: np.ndarray = field(repr=False)
    refresh: Refresh = field(repr=False)
    terms: DpSgdConfig
    directions: Directions | None


@dataclass(frozen=True)
class Step:
    """A share of one step; the answer is a `privacy.shares.Share`.

    Attributes:
      state: trained numbers before the step, see `privacy.shares`.
      records: records of the share; may be empty.
    """

    state: State = field(repr=False)
    records: Batch = field(repr=False)


@dataclass(frozen=True)
class Ready:
    """Answer to `Opening` and `Beginning`."""


@dataclass(frozen=True)
class Failed:
    """Answer in the place of any other.

    Attributes:
      kind: name of the exception.
      reason: its words, for the site's own log.
    """

    kind: str
    reason: str


def send(connection: Connection, message: object) -> None:
    """Sends a message, of any length.

    Plainly pickled: `Connection.send` would share tensors through files or through a socket with a name.
    """
    connection.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> Any:
    """Returns the next message.

    Raises:
      EOFError, OSError: the other process has ended.
    """
    return pickle.loads(connection.recv_bytes())  # noqa: S301 - from the process at the other end, see the first lines
