"""The health check of a coordinator's job or a client: exit code 0 while all is well, else 1 with a line that says why.

  healthcheck.py coordinator HOME     the folder of `offsite coordinator init`
  healthcheck.py client SITE          the folder of `offsite client init`

The check reads files and /proc only, knows no secret, and runs with the Python that offsite is installed in.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from offsite.coordinator.home.status import read_status
from offsite.errors import DataError

ARGUMENTS = 3
PROCESSES = Path("/proc")
SUPERNODE = "offsite.client.network.supernode"


def coordinator(home: Path) -> str:
    """Returns the fault of a coordinator's job, or an empty text."""
    try:
        facts = read_status(home / "status.json")
    except DataError:
        return "no job was started here yet"
    if facts["state"] == "killed":
        return "the job's process is gone"
    return f"state={facts['state']}: {facts.get('detail', '')}" if facts["state"] in ("stopped", "failed") else ""


def client(site: Path) -> str:
    """Returns the fault of a running client, or an empty text; a client that waits for its coordinator is well."""
    node = str((site / "state" / "node").resolve())
    if any(SUPERNODE in command and node in command for command in _commands()):
        return ""
    return "its SuperNode is not running"


def _commands() -> Iterator[str]:
    for path in PROCESSES.glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # the process has ended meanwhile


def main() -> int:
    """Looks once and returns the exit code."""
    checks = {"coordinator": coordinator, "client": client}
    if len(sys.argv) != ARGUMENTS or sys.argv[1] not in checks:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    fault = checks[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.write(f"{fault or 'well'}\n")
    return 1 if fault else 0


if __name__ == "__main__":
    raise SystemExit(main())
