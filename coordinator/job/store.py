"""The run folder, written so that after any kill it stands at the last whole round."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from offsite.coordinator.aggregation.rules import ServerState
from offsite.coordinator.job.job_facts import JobFacts
from offsite.coordinator.job.json_form import decode, encode
from offsite.coordinator.job.round_record import RoundRecord
from offsite.emulator.runtime.refresh_state import WIRE, Refresh
from offsite.errors import DataError
from offsite.protos.job_manifest import JobManifest
from offsite.trust.files import unwritable, write_atomically

BIAS = "refresh/"  # before the name of an emulator's bias
JOB, JOB_FACTS, ROUNDS = "job.json", "job_facts.json", "rounds.jsonl"
MODEL_FILES = "model_files.json"  # hashes of the full model's files


@dataclass(frozen=True)
class Progress:
    """The state of a run after a whole round.

    Attributes:
      server: last accepted adapter, with its running means.
      round: number of rounds done; 0 before the first round.
      public_loss: lowest public loss of an accepted adapter, in the task's unit.
      correction: strength with which the accepted adapter was corrected for plug-in; 0 without a correction.
      corrected: corrected adapter that was plugged in, float32 (d,); None where the server's adapter was plugged in.
      refresh: biases of the emulator that go with the next round.
    """

    server: ServerState
    round: int
    public_loss: float
    correction: float = 0.0
    corrected: np.ndarray | None = None
    refresh: Refresh = ()

    @property
    def plugged(self) -> np.ndarray:
        """The adapter of the full model; the sites continue from `server.adapter`, which belongs to the emulator."""
        return self.server.adapter if self.corrected is None else self.corrected


class Store:
    """The files of one run.

    Args:
      folder: the run folder; created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.partial"):  # from a process that was killed while it wrote
            leftover.unlink(missing_ok=True)

    @property
    def package(self) -> Path:
        """Folder of the emulator package."""
        return self.folder / "package"

    def package_of(self, name: str) -> Path:
        """Returns the folder of an emulator's package; `name` is its first site, and empty for the default."""
        return self.folder / "packages" / name if name else self.package

    def clear_packages(self) -> None:
        """Removes the packages that a killed build left behind."""
        for folder in (self.package, self.folder / "packages"):
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def adapter(self) -> Path:
        """Folder of the exported adapter."""
        return self.folder / "adapter"

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file of the run."""
        write_atomically(self.folder / name, json.dumps(content, indent=1, allow_nan=False).encode())

    def read_json(self, name: str) -> Any:
        """Reads a JSON file of the run.

        Raises:
          DataError: the file does not exist, or is not whole.
        """
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"run={str(self.folder)!r}: no readable {name}; give a run folder") from error

    def job(self) -> JobManifest | None:
        """Returns the manifest of the prepared job, or None when preparation did not finish."""
        path = self.folder / JOB
        return JobManifest.from_bytes(path.read_bytes()) if path.exists() else None

    def job_facts(self) -> JobFacts:
        """Returns the measurements from the preparation of the job.

        Raises:
          DataError: the file is missing or damaged.
        """
        return decode(JobFacts, self.read_json(JOB_FACTS), JOB_FACTS)

    def save_job(self, manifest: JobManifest, facts: JobFacts) -> None:
        """Stores a prepared job, which is the job of this run from here on."""
        self.write_json(JOB_FACTS, encode(facts))
        write_atomically(self.folder / JOB, manifest.to_bytes())  # last, since this file makes the job count

    def save(self, progress: Progress, record: RoundRecord) -> None:
        """Stores a whole round: its line first, then the state that makes the line count."""
        path = self.folder / ROUNDS
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(encode(record), allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(path, error) from error
        self.save_state(progress)

    def save_state(self, progress: Progress) -> None:
        """Writes the resume point."""
        server = progress.server
        arrays = {"adapter": server.adapter, "first": server.first, "second": server.second}
        if progress.corrected is not None:
            arrays["corrected"] = progress.corrected
        arrays |= {BIAS + name: np.frombuffer(values, WIRE) for name, values in progress.refresh}
        facts = {
            "round": progress.round,
            "public_loss": progress.public_loss,
            "server_rounds": server.rounds,
            "correction": progress.correction,
        }
        write_atomically(self.folder / "state.safetensors", save(arrays, metadata={"facts": json.dumps(facts)}))

    def load_state(self) -> Progress | None:
        """Returns the resume point, or None before the first resume point.

        Raises:
          DataError: the file is damaged.
        """
        path = self.folder / "state.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads(file.metadata()["facts"])
                arrays = {name: np.array(file.get_tensor(name)) for name in set(file.keys())}
            server = ServerState(arrays["adapter"], arrays["first"], arrays["second"], int(facts["server_rounds"]))
            numbers = int(facts["round"]), float(facts["public_loss"]), float(facts["correction"])
        except (SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
            raise DataError(f"run={str(self.folder)!r}: state.safetensors is damaged; start a new run") from error
        moved = sorted(name for name in arrays if name.startswith(BIAS))
        refresh = tuple((name.removeprefix(BIAS), arrays[name].astype(WIRE).tobytes()) for name in moved)
        return Progress(server, *numbers, arrays.get("corrected"), refresh)

    def rounds(self) -> tuple[RoundRecord, ...]:
        """Returns the records of all whole rounds, in order.

        Raises:
          DataError: a line is not a record.
        """
        return tuple(record for _, record in self._lines())

    def drop_rounds_after(self, last: int) -> None:
        """Removes lines of rounds that did not become whole before a kill; the other lines stay as they are."""
        content = "".join(f"{text}\n" for text, record in self._lines() if record.round <= last)
        write_atomically(self.folder / ROUNDS, content.encode())

    def _lines(self) -> Iterator[tuple[str, RoundRecord]]:
        path = self.folder / ROUNDS
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                content = json.loads(text)
            except ValueError:
                continue  # the kill came while this line was written, so its round does not count
            yield text, decode(RoundRecord, content, ROUNDS)
