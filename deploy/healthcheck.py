"""What a container or a monitor asks: exit code 0 while a coordinator's job or a client is well, 1 with a line else.

  healthcheck.py coordinator HOME     the folder of `offsite coordinator init`
  healthcheck.py client SITE          the folder of `offsite client init`

It reads files and /proc only, knows no secret, and loads nothing but the standard library.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ENDED = ("stopped", "failed")
ARGUMENTS = 3
STARTED = 19  # place of the start time behind the name of the program, field 22 of proc_pid_stat(5)


def coordinator(home: Path, processes: Path) -> str:
    """Returns what is wrong with the job of a coordinator, or nothing."""
    try:
        facts = json.loads((home / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "no job was started here yet"
    if facts["state"] == "finished":
        return ""
    if facts["state"] in ENDED:
        return f"state={facts['state']}: {facts.get('detail', '')}"
    return "" if _is_running(facts["pid"], facts.get("born", ""), processes) else "the job's process is gone"


def _is_running(pid: int, birth: str, processes: Path) -> bool:
    """Says whether a process is the one that wrote the status; by its number alone where that says no more."""
    if not processes.is_dir():  # macOS
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True  # another user's
        return True
    now = _born(pid, processes)
    return (processes / str(pid)).exists() and (not birth or not now or now == birth)


def _born(pid: int, processes: Path) -> str:
    """Returns what `coordinator.status.born` does: after a restart another process may have the number."""
    try:
        boot = (processes / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = (processes / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return f"{boot} {stat.rpartition(')')[2].split()[STARTED]}"


def client(site: Path, processes: Path) -> str:
    """Returns what is wrong with a running client, or nothing; one that waits for its coordinator is well."""
    node = str((site / "state" / "node").resolve())
    if any("offsite.client.network.supernode" in command and node in command for command in _commands(processes)):
        return ""
    return "its SuperNode is not running"


def _commands(processes: Path) -> Iterator[str]:
    for path in processes.glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has ended meanwhile


def main() -> int:
    """Looks once and returns the exit code."""
    checks = {"coordinator": coordinator, "client": client}
    if len(sys.argv) != ARGUMENTS or sys.argv[1] not in checks:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    wrong = checks[sys.argv[1]](Path(sys.argv[2]), Path("/proc"))
    sys.stdout.write(f"{wrong or 'well'}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
