"""A worker's side of a training: the same emulator, the same engine, and a share of each step's records."""

import secrets
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch

from offsite.client.training.emulator_session import open_session
from offsite.client.training.trainable_subset import only_trainable
from offsite.client.training.worker_messages import Beginning, Failed, Opening, Ready, Step, receive, send
from offsite.errors import OffsiteError
from offsite.privacy.faults import is_memory
from offsite.privacy.mechanism import gradient_shares
from offsite.privacy.probe import probe
from offsite.privacy.shares import Compute, Share
from offsite.privacy.zero_order import slope_shares
from offsite.protos.job_manifest import JobManifest

T = TypeVar("T")
_FAULT = "TrainingFault"
EXIT_BROKEN = 70


def serve(connection: Connection) -> None:
    """Answers the messages of the process that trains, until one end of the connection has gone."""
    try:
        opening: Opening = receive(connection)
        worker = _tried(lambda: WorkerTraining(opening))
        send(connection, worker if isinstance(worker, Failed) else Ready())
        while isinstance(worker, WorkerTraining):
            send(connection, worker.answer(receive(connection)))
    except (EOFError, OSError):
        return
    except Exception:  # as memory that is too short for a message; its words could quote a record
        raise SystemExit(EXIT_BROKEN) from None


class WorkerTraining:
    """The emulator of a worker, and the training that has begun on it.

    Args:
      opening: first message.

    Raises:
      OffsiteError: the package is not the one that was named.
    """

    def __init__(self, opening: Opening) -> None:
        torch.set_num_threads(opening.threads)
        if (index := torch.device(opening.device).index) is not None:
            torch.accelerator.set_device_index(index)  # so that nothing of this process lies on the first device
        self._manifest = JobManifest.from_bytes(opening.manifest)
        self._session = open_session(
            opening.folder,
            self._manifest,
            emulator=opening.emulator,
            limits=opening.limits,
            seed=secrets.randbits(62),
            weights=opening.weights,
            device=opening.device,
            dtype=opening.dtype,
            recompute=opening.recompute,
            vetted=True,
        )
        self._training = ExitStack()
        self._compute: Compute | None = None

    def answer(self, message: Beginning | Step) -> Ready | Share | Failed:
        """Returns the answer to a message."""
        if isinstance(message, Beginning):
            return _tried(lambda: self._begin(message))
        compute = self._compute
        if compute is None:
            return Failed(_FAULT, "no training has begun")
        return _tried(lambda: compute(message.state, message.records))

    def _begin(self, beginning: Beginning) -> Ready:
        """Puts the model where the other process' model is, and opens the same engine on it."""
        self._training.close()
        self._compute = None
        session, manifest, terms = self._session, self._manifest, beginning.terms
        session.biases.put(())
        session.biases.put(beginning.refresh)
        session.put(beginning.start)
        losses, tried = session.task.losses, session.task.dummy_batch(session.model, manifest.length, seed=session.seed)
        invented = tried.select([0])
        if beginning.directions is not None:
            shares = slope_shares(session.model, losses, beginning.directions, invented)
        else:
            if session.engine != terms.engine:  # the other process has probed its own device, not this one
                probe(session.model, losses, tried, terms.engine)
                session.engine = terms.engine
            subset = only_trainable(session.model, manifest, site=beginning.site, number=beginning.number)
            self._training.enter_context(subset)
            shares = gradient_shares(session.model, losses, terms, invented)
        self._compute = self._training.enter_context(shares)
        return Ready()


def _tried(act: Callable[[], T]) -> T | Failed:
    """Returns what a function returns, or its failure; the words of an unknown error could quote a record."""
    try:
        return act()
    except OffsiteError as error:
        return Failed(type(error).__name__, str(error))
    except Exception as error:
        if is_memory(error):
            return Failed(MemoryError.__name__, "memory is too short")
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return Failed(_FAULT, f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}")
