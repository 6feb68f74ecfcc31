"""The status of a job, in a file that another process can read at any moment."""

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
_STARTED = 19  # index of the start time behind the name of the program: field 22 of proc_pid_stat(5)


class Status:
    """The status file of one coordinator.

    Args:
      path: path of the file.
      clock: function that returns the time.
    """

    def __init__(self, path: Path, clock: Callable[[], datetime]) -> None:
        self._path, self._clock = path, clock
        pid = os.getpid()
        self._facts: dict[str, Any] = {"state": "starting", "pid": pid, "born": born(pid), "sites": {}, "round": 0}

    def set(self, state: str, **facts: Any) -> None:
        """Writes the state and facts; a fact stays until it is set again, but after an end nothing is awaited."""
        ended: dict[str, Any] = {"awaited": []} if state in ENDED else {}
        self._facts |= {"state": state, **ended, **facts}
        self._write()

    def site(self, name: str, state: str, detail: str, fetched: int) -> None:
        """Writes the state of a site, with the bytes that the site has fetched."""
        known = self._facts["sites"].get(name, {})
        seen = self._now() if state != "absent" else known.get("seen")
        fresh = {"state": state, "detail": detail, "fetched": fetched}
        changed = {key: known.get(key) for key in fresh} != fresh
        self._facts["sites"][name] = fresh | {"seen": seen}
        if changed:
            self._write()

    def reasons(self) -> str:
        """Returns each site that is not ready, with the reason, on one line."""
        waiting = {name: site for name, site in self._facts["sites"].items() if site["state"] != "ready"}
        return ", ".join(f"{name}: {site['detail'] or site['state']}" for name, site in sorted(waiting.items()))

    def _write(self) -> None:
        content = json.dumps(self._facts | {"updated": self._now()}, indent=1, sort_keys=True)
        write_atomically(self._path, content.encode())

    def _now(self) -> str:
        return self._clock().isoformat(timespec="seconds")


def read_status(path: Path) -> dict[str, Any]:
    """Returns the status of a coordinator; the state is `killed` where its process is gone without an end.

    Raises:
      DataError: no job was started in this folder.
    """
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"status={str(path)!r}: no job was started here; `offsite coordinator run` starts a job"
        ) from error
    if facts["state"] not in ENDED and not is_running(facts["pid"], facts.get("born", "")):
        facts |= {"state": "killed", "next": "run the same command again; the job goes on where it was"}
    return facts


def born(pid: int, processes: Path = PROCESSES) -> str:
    """Returns the boot and the tick in which a process began; empty where the system does not show them.

    Both are needed: after a restart of the machine or of a container, another process soon has the same number.
    """
    try:
        boot = (processes / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = (processes / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return f"{boot} {stat.rpartition(')')[2].split()[_STARTED]}"  # a program may have a bracket in its name


def is_running(pid: int, birth: str, processes: Path = PROCESSES) -> bool:
    """Returns whether the process with this number and this birth still runs.

    Args:
      pid: number of the process.
      birth: result of `born` for the process; where it is empty, the number alone decides.
      processes: folder of processes.
    """
    if not processes.is_dir():  # macOS has no such folder, and shows a process by its number only
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True  # the process belongs to another user
        return True
    now = born(pid, processes)
    return (processes / str(pid)).exists() and (not birth or not now or now == birth)
