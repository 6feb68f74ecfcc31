"""Where a job stands, in a file that another process can read at any moment."""

import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from offsite.errors import DataError
from offsite.trust.files import write_atomically

ENDED = ("finished", "stopped", "failed")
PROCESSES = Path("/proc")
_STARTED = 19  # place of the start time behind the name of the program, field 22 of proc_pid_stat(5)


class Status:
    """The status file of one coordinator.

    Args:
      path: the file.
      clock: gives the time.
    """

    def __init__(self, path: Path, clock: Callable[[], datetime]) -> None:
        self._path, self._clock = path, clock
        pid = os.getpid()
        self._facts: dict[str, Any] = {"state": "starting", "pid": pid, "born": born(pid), "sites": {}, "round": 0}

    def set(self, state: str, **facts: Any) -> None:
        """Says what is being done; facts stay until they are set again, but after an end nothing is awaited."""
        ended: dict[str, Any] = {"awaited": []} if state in ENDED else {}
        self._facts |= {"state": state, **ended, **facts}
        self._write()

    def site(self, name: str, state: str, detail: str, fetched: int) -> None:
        """Says where a site is."""
        known = self._facts["sites"].get(name, {})
        seen = self._now() if state != "absent" else known.get("seen")
        fresh = {"state": state, "detail": detail, "fetched": fetched}
        changed = {key: known.get(key) for key in fresh} != fresh
        self._facts["sites"][name] = fresh | {"seen": seen}
        if changed:
            self._write()

    def reasons(self) -> str:
        """Returns site and reason of everyone who is not ready, on one line."""
        waiting = {name: one for name, one in self._facts["sites"].items() if one["state"] != "ready"}
        return ", ".join(f"{name}: {one['detail'] or one['state']}" for name, one in sorted(waiting.items()))

    def _write(self) -> None:
        content = json.dumps(self._facts | {"updated": self._now()}, indent=1, sort_keys=True)
        write_atomically(self._path, content.encode())

    def _now(self) -> str:
        return self._clock().isoformat(timespec="seconds")


def read_status(path: Path) -> dict[str, Any]:
    """Returns the status of a coordinator; one whose process is gone without an end is `killed`.

    Raises:
      DataError: no job was started there.
    """
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"status={str(path)!r}: no job was started here; `offsite coordinator run` starts one"
        ) from error
    if facts["state"] not in ENDED and not is_running(facts["pid"], facts.get("born", "")):
        facts |= {"state": "killed", "next": "run the same command again; it goes on where it was"}
    return facts


def born(pid: int, processes: Path = PROCESSES) -> str:
    """Returns the boot and the tick in which a process began; empty where that cannot be known.

    After a restart of the machine or of a container, another process soon has the same number.
    """
    try:
        boot = (processes / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = (processes / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return f"{boot} {stat.rpartition(')')[2].split()[_STARTED]}"  # a program may have a bracket in its name


def is_running(pid: int, birth: str, processes: Path = PROCESSES) -> bool:
    """Says whether a process is still the one that was born then.

    Args:
      pid: its number.
      birth: what `born` told; where that was nothing, the number alone decides.
      processes: the folder of processes.
    """
    if not processes.is_dir():  # macOS has none, and tells of a process by its number only
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True  # another user's
        return True
    now = born(pid, processes)
    return (processes / str(pid)).exists() and (not birth or not now or now == birth)
