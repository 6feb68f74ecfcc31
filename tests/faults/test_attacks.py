"""Two attacks of a peer that holds nothing but the CA certificate: both work on stock Flower, and both fail here.

The stock side is Flower as its documentation secures it: TLS, node authentication, no flag of ours.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, GetNodesRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from offsite.coordinator.network.superlink_session import _pem
from offsite.protos.flower_process import QUIET
from offsite.trust.certificates import create_authority, issue_server, new_key
from offsite.trust.keys import SiteKeys
from tests.faults.conftest import Federation, wait_for
from tests.faults.hostile import HostileCoordinator
from tests.ports import free_ports

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Target:
    """The target of an attacker's programs, with all that the attacker holds: an address and a public certificate."""

    address: str
    ca: bytes

    def control(self) -> ControlHttpClient:
        return ControlHttpClient.from_server_address(
            self.address,
            insecure=False,
            root_certificates=self.ca,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-cli")],
        )

    def runtime(self, *interceptors: Any) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=False,
            root_certificates=self.ca,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"), *interceptors],
        )


# the attacks


def bundle_with_code(marker: Path) -> tuple[bytes, str]:
    """A bundle with client code that writes a file wherever the code runs."""
    project = """
[project]
name = "evil"
version = "1.0.0"
description = "x"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "evil"
[tool.flwr.app.components]
serverapp = "evil.server:app"
clientapp = "evil.client:app"
"""
    server = """
import time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.5)
    content = RecordDict({"c": ConfigRecord({"x": 1})})
    list(grid.send_and_receive([Message(content, dst_node_id=n, message_type="query") for n in nodes]))
"""
    client = f"""
import os
from pathlib import Path
from flwr.app import Message
from flwr.clientapp import ClientApp
app = ClientApp()
@app.query()
def query(message, context):
    Path({str(marker)!r}).write_text(f"ran as pid {{os.getpid()}} with {{sorted(os.environ)}}")
    return Message(message.content, reply_to=message)
"""
    files = {"pyproject.toml": project, "evil/__init__.py": "", "evil/server.py": server, "evil/client.py": client}
    import hashlib

    content, _ = build_fab_from_files({name: text.encode() for name, text in files.items()})
    return content, hashlib.sha256(content).hexdigest()


def submit_code(target: Target, marker: Path) -> int:
    """Starts a run with code of its own on every node."""
    content, digest = bundle_with_code(marker)
    control = target.control()
    try:
        return int(control.StartRun(StartRunRequest(fab=fab_to_proto(Fab(digest, content, {})))).run_id)
    finally:
        control.close()


def steal_task(target: Target, seconds: float) -> list[int]:
    """Takes the coordinator's task before the coordinator does, and lists the nodes with it."""
    client = target.runtime()
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
            if answer.HasField("task") and answer.token:
                owner = target.runtime(RuntimeTokenHttpInterceptor(str(answer.token)))
                nodes = owner.GetNodes(GetNodesRequest()).nodes
                owner.close()
                return [int(node.node_id) for node in nodes]
            time.sleep(0.01)
    finally:
        client.close()
    return []


# stock Flower


@contextmanager
def stock(folder: Path) -> Iterator[tuple[Target, bytes]]:
    """A SuperLink and a SuperNode as they come, with TLS and node authentication; gives the node's public key."""
    from datetime import UTC, datetime

    authority, key, now = create_authority("stock", now=datetime.now(UTC)), new_key(), datetime.now(UTC)
    ca, certificate, server_key = folder / "ca.pem", folder / "server.pem", folder / "server.key"
    ca.write_bytes(authority.certificate)
    server_key.write_bytes(key)
    certificate.write_bytes(issue_server(authority, key, ["127.0.0.1"], now=now))
    keys = SiteKeys.create(folder / "keys", 1)
    link, local = free_ports(2)
    target = Target(f"127.0.0.1:{link}", authority.certificate)
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | QUIET | {"FLWR_HOME": str(folder / "flwr"), "PATH": path}
    commands = (
        [
            *(str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(link)),
            *("--ssl-ca-certfile", str(ca), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(server_key)),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
            *("--database", str(folder / "state.db")),
        ],
        [
            *(str(BIN / "flower-supernode"), "--superlink", target.address, "--root-certificates", str(ca)),
            *("--auth-supernode-private-key", str(keys.node), "--host", "127.0.0.1", "--port", str(local)),
        ],
    )
    running = []
    try:
        for number, command in enumerate(commands):
            with (folder / f"stock-{number}.log").open("wb") as log:
                running.append(
                    subprocess.Popen(
                        command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
                    )
                )
            if number == 0:
                wait_for(lambda: healthy(target), 60)
                register(target, _pem(keys.node_public()))
        yield target, _pem(keys.node_public())
    finally:
        for process in reversed(running):
            for number in (15, 9):
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    break
                time.sleep(1)
            process.wait(timeout=30)


def healthy(target: Target) -> bool:
    import ssl

    context = ssl.create_default_context(cadata=target.ca.decode())
    try:
        return httpx.get(f"https://{target.address}/health", verify=context).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def register(target: Target, public: bytes) -> None:
    control = target.control()
    control.RegisterNode(RegisterNodeRequest(public_key=public, name="node"))
    control.close()


def online(target: Target) -> bool:
    control = target.control()
    try:
        return any(node.status == "online" for node in control.ListNodes(ListNodesRequest()).nodes_info)
    finally:
        control.close()


def test_both_attacks_work_on_stock_flower(tmp_path: Path) -> None:
    marker = tmp_path / "code-ran"
    with stock(tmp_path) as (target, _):
        wait_for(lambda: online(target), 60)
        submit_code(target, marker)
        wait_for(marker.exists, 120)
        assert "ran as pid" in marker.read_text()
        nodes: list[int] = []
        for _ in range(20):  # whoever asks first has a task, and that is Flower's own program now and then
            submit_code(target, marker)
            if nodes := steal_task(target, 5):
                break
        assert len(nodes) == 1  # the very node, seen with a token that nobody was to have


# ours


@pytest.fixture(scope="module")
def ours(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostileCoordinator]:
    made = Federation(tmp_path_factory.mktemp("attacked"), fed)
    made.start_sites()
    try:
        with HostileCoordinator(made, made.job("attacked", rounds=1)) as coordinator:
            coordinator.ready()
            yield coordinator
    finally:
        made.stop()


def target_of(coordinator: HostileCoordinator) -> Target:
    settings = coordinator.home.settings
    return Target(f"{settings.host}:{settings.link_port}", coordinator.home.ca.read_bytes())


def test_code_of_a_peer_is_not_taken(ours: HostileCoordinator, tmp_path: Path) -> None:
    marker = tmp_path / "code-ran"
    with pytest.raises(httpx.HTTPStatusError) as refused:
        submit_code(target_of(ours), marker)
    assert refused.value.response.status_code == httpx.codes.NOT_FOUND
    assert healthy(target_of(ours))  # the server is there, and answers the questions that peers may ask
    time.sleep(2)
    assert not marker.exists()


def test_the_coordinators_task_is_not_given_away(ours: HostileCoordinator) -> None:
    with pytest.raises(httpx.HTTPStatusError) as refused:
        steal_task(target_of(ours), 5)
    assert refused.value.response.status_code == httpx.codes.NOT_FOUND


def test_code_that_the_coordinator_itself_submits_is_not_run(ours: HostileCoordinator, tmp_path: Path) -> None:
    """With the secret of its machine a coordinator can start such a run; its sites answer with an error."""
    from flwr.app import Message
    from flwr.proto.runtime_pb2 import PullTaskInputRequest
    from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

    from offsite.coordinator.network.flower_grid import GuardedGrid
    from offsite.coordinator.network.superlink_session import _ACQUIRE
    from offsite.protos.flower import pack
    from offsite.protos.guard import Secret

    marker, target, folder = tmp_path / "code-ran", target_of(ours), ours.home.link
    guard, master = (folder / "guard").read_text(), (folder / "superexec").read_bytes()
    content, digest = bundle_with_code(marker)
    control = ControlHttpClient.from_server_address(
        target.address,
        insecure=False,
        root_certificates=target.ca,
        interceptors=[Secret(guard), RuntimeVersionHttpInterceptor(component_name="flwr-cli")],
    )
    run_id = control.StartRun(StartRunRequest(fab=fab_to_proto(Fab(digest, content, {})))).run_id
    control.close()
    taker = target.runtime(
        Secret(guard), SuperExecAuthHttpInterceptor(master_secret=master, protected_methods=[_ACQUIRE])
    )
    answer = wait_for(
        lambda: (
            (found := taker.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))).HasField("task")
            and found.task.run_id == run_id
            and found
        ),
        20,
    )
    before = TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id
    owner = target.runtime(Secret(guard), RuntimeTokenHttpInterceptor(str(answer.token)))
    pulled = owner.PullTaskInput(PullTaskInputRequest())
    try:
        TaskIdentity.task_id, TaskIdentity.run_id = pulled.task_id, pulled.run.run_id
        TaskIdentity.node_id = pulled.context.node_id
        grid = GuardedGrid(target.address, target.ca, token=str(answer.token), secret=guard, largest=1 << 20)
        grid.set_run(Run.create_empty(run_id=run_id))
        node = ours.link.node_ids()["ash"]
        message = Message(content=pack("offer", b""), dst_node_id=node, message_type="train")
        (identifier,) = grid.push_messages([message])
        (reply,) = wait_for(lambda: list(grid.pull_messages([identifier])), 60, every=0.2)
    finally:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = before
        for client in (taker, owner, grid):
            client.close()
    assert reply.has_error()
    assert "bundle is not the one without code" in reply.error.reason
    assert not marker.exists()
    refused = ours.federation.audit("ash", "foreign bundle refused")
    assert [one["reason"] for one in refused] == [f"sha256={digest}"]
