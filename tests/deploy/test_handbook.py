"""docs/operations.md against the code: the keys, states, checks and numbers on the page are those that run."""

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from offsite.client.home.policy import Policy
from offsite.trust import certificates

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text()


def section(title: str) -> str:
    return re.split(r"(?m)^## ", TEXT.split(f"\n## {title}\n")[1])[0]


def constants(path: str) -> dict[str, Any]:
    """Returns the plain constants at the top of a module, without loading what it needs."""
    found: dict[str, Any] = {}
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                try:
                    value = ast.literal_eval(node.value)
                except ValueError:
                    continue
                values = value if isinstance(target, ast.Tuple) else [value]
                found |= {name.id: one for name, one in zip(names, values, strict=True) if isinstance(name, ast.Name)}
    return found


def row(title: str, start: str) -> str:
    (line,) = [line for line in section(title).splitlines() if line.startswith(f"| {start}")]
    return line


def test_every_key_of_the_policy_with_its_default() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)` \| `(.+?)` \|", section("policy.toml"))
    template = dict(re.findall(r"(?m)^(\w+) = (.+?)\s+#", Policy.template()))
    assert dict(rows) == template
    assert set(template) == {field.name for field in dataclasses.fields(Policy)}


def test_every_state_of_a_job() -> None:
    sources = [*(ROOT / "coordinator").rglob("*.py"), ROOT / "cli" / "coordinator_run.py"]
    code = "".join(path.read_text() for path in sources)
    states = set(re.findall(r'status\.set\(\s*"([^"]+)"', code)) | set(re.findall(r'"state": "([^"]+)"', code))
    listed = set(re.findall(r"`([^`]+)`", "".join(re.findall(r"(?m)^\| (`.+?) \|", section("coordinator status")))))
    assert len(states) > 8
    assert states <= listed


def test_every_state_of_a_site() -> None:
    preparing, serving = constants("client/service/job_loading.py"), constants("client/service/stage_handler.py")
    states = {preparing["FETCHING"], preparing["READY"], constants("client/home/redact.py")["REFUSED"]}
    states |= {serving["WAITING"], "absent"}
    for name in states:
        assert f"| `{name}`" in section("coordinator status"), name


def test_every_check_of_doctor() -> None:
    code = (ROOT / "client" / "service" / "doctor.py").read_text().split("checks: dict")[1].split("return [")[0]
    first = re.findall(r"(?m)^\| ([a-z ,]+) \|", section("doctor"))
    listed = {one.strip() for cell in first for one in cell.split(",")}
    assert set(re.findall(r'(?m)^\s+"([\w ]+)":', code)) == listed - {"check"}


@pytest.mark.parametrize(
    ("start", "numbers"),
    [
        ("answer to an offer", [constants("coordinator/service.py")["OFFER_SECONDS"]]),
        ("a piece of an upload", [constants("coordinator/network/superlink.py")["UPLOAD_IDLE_SECONDS"]]),
        (
            "depot: nothing moves",
            [constants("client/network/fetch.py")[n] for n in ("IDLE_SECONDS", "PATIENCE_SECONDS")],
        ),
        ("depot: pause", constants("client/network/fetch.py")["BACKOFF_SECONDS"]),
        ("site's heartbeat", [n * constants("client/network/supernode.py")["HEARTBEAT_SECONDS"] for n in (1, 2)]),
        ("site: SuperNode ended", constants("client/network/node.py")["BACKOFF_SECONDS"]),
        ("site: disk, data", constants("client/service/job_loading.py")["PAUSES"]),
        ("site: a text", [constants("task/tokenizer_worker.py")["CPU_SECONDS"]]),
        ("site: longest pause", [constants("client/network/supernode.py")["RETRY_SECONDS"]]),
        (
            "depot: a request",
            [constants("coordinator/network/depot.py")[n] for n in ("REQUEST_SECONDS", "HANDSHAKE_SECONDS")],
        ),
        ("coordinator: SuperLink", [constants("coordinator/network/superlink_session.py")["START_SECONDS"]]),
        ("coordinator: SuperLink", [constants("coordinator/network/flower_grid.py")["LOST_SECONDS"]]),
        ("coordinator: SuperLink", [constants("coordinator/service.py")["LINK_TRIES"]]),
        ("clock of a site", [constants("client/service/doctor.py")[n] for n in ("AHEAD_SECONDS", "BEHIND_SECONDS")]),
        ("certificates and epochs", [certificates.DAYS, certificates.AUTHORITY_DAYS, certificates.WARN_DAYS]),
    ],
)
def test_the_numbers_of_the_page_of_timeouts(start: str, numbers: list[float]) -> None:
    told = [float(one) for one in re.findall(r"\d+(?:\.\d+)?", row("Timeouts", start).split("|")[2])]
    assert set(map(float, numbers)) <= set(told), told


def test_defaults_of_the_federation_file() -> None:
    code = (ROOT / "coordinator" / "config" / "coordinator_table.py").read_text()
    for key, start in (("deadline", "one stage"), ("patience", "waiting for sites"), ("attempts", "tries of a round")):
        found = re.search(rf"(?m)^    {key}: \w+ = ([\d.]+)$", code)
        assert found is not None
        assert f"{float(found[1]):g}" in row("Timeouts", start).split("|")[2]
        assert f"coordinator.{key}" in row("Timeouts", start)


def test_every_command_in_it_exists() -> None:
    code = "".join((ROOT / "cli" / f"{name}.py").read_text() for name in ("coordinator", "coordinator_run"))
    site = "".join((ROOT / "cli" / f"{name}.py").read_text() for name in ("client", "client_run"))
    known = {"coordinator": names(code), "client": names(site) | {"audit"}}
    used = set(re.findall(r"offsite (coordinator|client) ([a-z-]+)", TEXT))
    assert len(used) > 10
    assert [one for one in used if one[1] not in known[one[0]]] == []
    assert {("client", one) for one in known["client"] - {"request"}} <= used


def names(code: str) -> set[str]:
    plain = set(re.findall(r"@app\.command\(\)\ndef (\w+)", code))
    return plain | set(re.findall(r'@app\.command\("([\w-]+)"\)', code))
