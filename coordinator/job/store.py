"""What survives a crash: the run folder, written so that after any kill it stands at the last whole round."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from offsite.coordinator.aggregation.rules import ServerState
from offsite.emulator.runtime.refresh_state import WIRE, Refresh
from offsite.errors import DataError, OffsiteError
from offsite.trust.files import PUBLIC, write_whole

BIAS = "refresh/"  # before the name of an emulator's bias


def write_atomically(path: Path, content: bytes, *, mode: int = PUBLIC) -> None:
    """Replaces a file in one step, on disk before the old one is gone.

    Raises:
      DataError: the disk is full or the folder cannot be written; the old file stands.
    """
    try:
        write_whole(path, content, mode=mode)
    except OffsiteError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> DataError:
    cause = error if isinstance(error, OSError) else error.__cause__
    reason = cause.strerror if isinstance(cause, OSError) else error
    return DataError(f"file={str(path)!r}: cannot be written ({reason}); free disk space, then run again")


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a whole round.

    Attributes:
      server: adapter and running means; the last accepted ones.
      round: rounds done, 0 before the first.
      public_loss: the best of the accepted adapters, nats per token.
      correction: strength with which the accepted adapter was corrected for plug-in, 0 for not at all.
      corrected: the adapter as it was plugged in, float32 (d,), where that is not the server's.
      refresh: the emulator's biases as they go with the next round.
    """

    server: ServerState
    round: int
    public_loss: float
    correction: float = 0.0
    corrected: np.ndarray | None = None
    refresh: Refresh = ()

    @property
    def plugged(self) -> np.ndarray:
        """The adapter of the full model; the sites go on from `server.adapter`, which belongs to the emulator."""
        return self.server.adapter if self.corrected is None else self.corrected


class Store:
    """The files of one run.

    Args:
      folder: the run folder; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.partial"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)

    @property
    def package(self) -> Path:
        """Folder of the emulator package."""
        return self.folder / "package"

    def package_of(self, name: str) -> Path:
        """Returns the folder of an emulator's package, named by the first of its sites; the default has no name."""
        return self.folder / "packages" / name if name else self.package

    def clear_packages(self) -> None:
        """Removes what a killed build left of the packages that are built now."""
        for folder in (self.package, self.folder / "packages"):
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def adapter(self) -> Path:
        """Folder of the exported adapter."""
        return self.folder / "adapter"

    def site(self, name: str) -> Path:
        """Returns the folder of one simulated site."""
        return self.folder / "sites" / name

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file of the run."""
        write_atomically(self.folder / name, json.dumps(content, indent=1, allow_nan=False).encode())

    def read_json(self, name: str) -> Any:
        """Reads a JSON file of the run.

        Raises:
          DataError: there is none, or it is not whole.
        """
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"run={str(self.folder)!r}: no readable {name}; is this a run folder") from error

    def save(self, progress: Progress, line: dict[str, Any]) -> None:
        """Records a whole round: its line first, then the state that makes the line count."""
        path = self.folder / "rounds.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(path, error) from error
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
        """Returns the resume point, or None before the first one.

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
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"run={str(self.folder)!r}: state.safetensors is damaged; start a new run") from error
        moved = sorted(name for name in arrays if name.startswith(BIAS))
        refresh = tuple((name.removeprefix(BIAS), arrays[name].astype(WIRE).tobytes()) for name in moved)
        return Progress(server, *numbers, arrays.get("corrected"), refresh)

    def rounds(self) -> list[dict[str, Any]]:
        """Returns the lines of all whole rounds, in order."""
        path = self.folder / "rounds.jsonl"
        if not path.exists():
            return []
        lines = []
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue  # the kill came while this line was written, so its round does not count
        return lines

    def drop_rounds_after(self, last: int) -> None:
        """Removes lines of rounds that did not become whole before a kill."""
        kept = [line for line in self.rounds() if line["round"] <= last]
        content = "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept)
        write_atomically(self.folder / "rounds.jsonl", content.encode())
