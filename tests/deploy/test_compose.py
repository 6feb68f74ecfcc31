"""docker-compose.yml and Dockerfile: rights to write, to reach others and to see records, read off the files."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from offsite.protos.flower_process import OPEN_FILES

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ("north", "south", "west")
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return content


@pytest.fixture(scope="module", params=["coordinator", *CLIENTS])
def service(compose: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    chosen: dict[str, Any] = compose["services"][request.param]
    return chosen


def mounts(service: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["target"]: one for one in service["volumes"]}


def test_one_coordinator_and_three_clients(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"coordinator", *CLIENTS}
    assert services["coordinator"]["command"] == ["offsite", "coordinator", "run", "/home-volume/fed.toml"]
    assert all(services[one]["command"] == ["offsite", "client", "run", "/site"] for one in CLIENTS)


def test_the_coordinator_may_hold_many_connections(compose: dict[str, Any]) -> None:
    assert compose["services"]["coordinator"]["ulimits"]["nofile"] == {"soft": OPEN_FILES, "hard": OPEN_FILES}


def test_no_service_takes_the_machines_memory_or_leaves_a_core(service: dict[str, Any]) -> None:
    assert service["ulimits"]["core"] == 0
    assert service["mem_limit"] == service["memswap_limit"] == "${MEMORY:-8g}"  # equal, so that nothing is swapped


def test_every_service_is_confined(service: dict[str, Any]) -> None:
    user, group = map(int, service["user"].split(":"))
    assert min(user, group) >= 1000
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [one.split(":")[0] for one in service["tmpfs"]] == ["/tmp"]
    assert {"noexec", "nosuid", "nodev"} <= set(service["tmpfs"][0].split(":")[1].split(","))
    assert service["restart"] == "on-failure"
    widening = {"privileged", "cap_add", "devices", "pid", "ipc", "network_mode", "env_file", "secrets", "userns_mode"}
    assert not widening & set(service)


def test_every_service_has_a_healthcheck_that_is_in_the_image(service: dict[str, Any]) -> None:
    kind, program, script, role, folder = service["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python")
    assert f"COPY deploy/healthcheck.py {script}" in (ROOT / "Dockerfile").read_text()
    assert role == service["command"][1]
    assert folder in service["command"][3]
    assert folder in mounts(service)


def test_nothing_is_reported_and_no_secret_stands_in_the_environment(service: dict[str, Any]) -> None:
    environment = service["environment"]
    assert environment.items() >= QUIET.items()
    assert not [name for name in environment if re.search(r"(?i)secret|token|password|key|credential", name)]


def test_records_are_seen_by_their_own_client_alone_and_never_written(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert "/data" not in mounts(services["coordinator"])
    for name in CLIENTS:
        data = mounts(services[name])["/data"]
        assert data["read_only"] is True
        assert f"data/{name}" in data["source"]
        assert not {"/model", "/public"} & set(mounts(services[name]))
    assert len({mounts(services[name])["/data"]["source"] for name in CLIENTS}) == len(CLIENTS)


def test_every_writable_folder_belongs_to_one_service(compose: dict[str, Any]) -> None:
    owners: dict[str, str] = {}
    for name, one in compose["services"].items():
        writable = [mount for mount in one["volumes"] if not mount.get("read_only")]
        assert [mount["target"] for mount in writable] == ["/home-volume" if name == "coordinator" else "/site"]
        assert writable[0]["type"] == "volume"
        assert owners.setdefault(writable[0]["source"], name) == name
    assert set(owners) == set(compose["volumes"])


def test_a_client_can_reach_the_coordinator_and_nobody_else(compose: dict[str, Any]) -> None:
    services, networks = compose["services"], compose["networks"]
    members = {net: {name for name, one in services.items() if net in one["networks"]} for net in networks}
    for name in CLIENTS:
        (only,) = services[name]["networks"]
        assert members[only] == {name, "coordinator"}
        assert networks[only]["internal"] is True
        assert "ports" not in services[name]
    assert members["outside"] == {"coordinator"}
    targets = [port.rsplit(":", 1)[1] for port in services["coordinator"]["ports"]]
    assert targets == ["8443", "8444"]


def test_tls_is_not_an_option() -> None:
    """No switch turns TLS off, neither in the files nor in the programs that they start."""
    for name in (
        "docker-compose.yml",
        "Dockerfile",
        "coordinator/network/superlink_session.py",
        "client/network/node.py",
        "coordinator/network/depot.py",
    ):
        text = (ROOT / name).read_text()
        assert "--insecure" not in text, name
        assert not re.search(r"add_insecure_port|insecure_channel|insecure=True", text), name


def test_the_image_runs_as_the_user_of_the_compose_file(compose: dict[str, Any]) -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert f"\nUSER {compose['services']['coordinator']['user']}\n" in text
    for name, value in QUIET.items():
        assert f"{name}={value}" in text
    assert '"torch==2.13.0"' in text
    assert re.search(r"(?m)^TORCH \?= torch==2\.13\.0$", (ROOT / "Makefile").read_text())
    last = text.rsplit("\nFROM ", 1)[1]
    assert "pip install" not in last


def test_no_registry_is_named() -> None:
    for name in ("Dockerfile", "docker-compose.yml", ".dockerignore", "deploy/healthcheck.py"):
        text = (ROOT / name).read_text()
        assert not re.search(r"https?://|\b[\w-]+\.(?:io|com|org|net|dev)\b", text), name


def test_only_what_the_image_is_made_of_is_sent_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    files = {"pyproject.toml", "requirements.lock", "README.md", "LICENSE", "deploy/healthcheck.py"}
    files |= {"deploy/wheel_backend.py"}
    parts = [name.split(".")[:2] for name in packages]  # a room's folder brings its content
    rooms = {name for part in parts for name in part}
    assert kept == rooms | files
    assert all((ROOT / one).exists() for one in kept)


def look(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(ROOT / "deploy" / "healthcheck.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("state", "own", "code"),
    [
        ("in a round", True, 0),
        ("finished", False, 0),
        ("in a round", False, 1),
        ("stopped", True, 1),
        ("failed", True, 1),
    ],
)
def test_health_of_a_coordinator(tmp_path: Path, state: str, own: bool, code: int) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    pid = os.getpid() if own else ended.pid
    (tmp_path / "status.json").write_text(json.dumps({"state": state, "pid": pid, "detail": "why"}))
    assert look("coordinator", str(tmp_path)).returncode == code


def test_health_of_a_client(tmp_path: Path) -> None:
    """A process with the command line of this site's SuperNode counts; another site's does not."""
    north, south = tmp_path / "north", tmp_path / "south"
    assert look("client", str(north)).returncode == 1
    pretend = ["offsite.client.network.supernode", "--auth", str(north / "state" / "node" / "superexec")]
    node = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *pretend])
    try:
        assert look("client", str(north)).returncode == 0
        assert look("client", str(south)).returncode == 1
    finally:
        node.kill()
        node.wait()
    assert look("client", str(north)).returncode == 1
    assert look("client").returncode == 2


def test_docker_itself_accepts_the_file() -> None:
    docker = shutil.which("docker")
    if docker is None:
        pytest.skip("no docker client here")
    if subprocess.run([docker, "compose", "version"], capture_output=True, timeout=60, check=False).returncode != 0:
        pytest.skip("this docker client has no compose")
    done = subprocess.run(
        [docker, "compose", "config", "-q"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
