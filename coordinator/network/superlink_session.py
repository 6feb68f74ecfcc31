"""All our uses of Flower's private interface at the coordinator: start a SuperLink, list its nodes, open a run.

Written against flwr 1.41; `tests/coordinator/test_link.py` is the contract that a newer Flower has to pass.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.common.constant import Status
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from offsite.coordinator.network.flower_grid import GuardedGrid, retries
from offsite.coordinator.network.superlink import LARGEST
from offsite.errors import ConfigError, DataError
from offsite.protos.flower import bundle
from offsite.protos.flower_http import ControlClient, RuntimeClient, http_client
from offsite.protos.flower_process import FlowerProcess
from offsite.protos.guard import HEADER, VARIABLE, Secret, new_secret
from offsite.trust.addresses import address_of, with_port

START_SECONDS = 60.0
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


@dataclass(frozen=True)
class SuperLinkPlace:
    """Where a SuperLink lives.

    Attributes:
      folder: folder of Flower's state, log and secrets.
      bind: address to listen on.
      port: port that sites reach.
      ca, certificate, key: PEM files of the coordinator.
    """

    folder: Path
    bind: str
    port: int
    ca: Path
    certificate: Path
    key: Path

    @property
    def local(self) -> str:
        """Address, host:port, under which the coordinator itself reaches the SuperLink."""
        address = address_of(self.bind)
        if address is not None and address.is_unspecified:
            return with_port("127.0.0.1" if address.version == 4 else "::1", self.port)
        return with_port(self.bind, self.port)


class SuperLinkSession:
    """A running SuperLink with one open run; used as a context manager.

    Args:
      place: where the SuperLink lives.
      nodes: public node key by site, an OpenSSH line; only these keys may be nodes.
      largest: bytes of the longest answer that an honest site gives.

    Raises:
      DataError: the SuperLink did not start.
    """

    def __init__(self, place: SuperLinkPlace, nodes: Mapping[str, str], *, largest: int) -> None:
        self._largest = largest
        self._place, self._keys = place, {site: _pem(line) for site, line in nodes.items()}
        self._ca = place.ca.read_bytes()
        self._guard = new_secret(place.folder / "guard")
        self._exec_secret = new_secret(place.folder / "superexec").encode()
        self._heartbeat: HeartbeatSender | None = None
        self._grid: GuardedGrid | None = None
        self._runtime: Any | None = None
        self.process = FlowerProcess(
            "offsite.coordinator.network.superlink",
            [
                *("--host", place.bind, "--port", str(place.port)),
                *("--ssl-ca-certfile", str(place.ca.resolve()), "--ssl-certfile", str(place.certificate.resolve())),
                *("--ssl-keyfile", str(place.key.resolve()), "--isolation", "process"),
                *("--superexec-auth-secret-file", str((place.folder / "superexec").resolve())),
                *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
                *("--database", str((place.folder / "state.db").resolve())),
            ],
            log=place.folder / "superlink.log",
            home=place.folder / "home",
            environment={VARIABLE: str((place.folder / "guard").resolve()), LARGEST: str(largest)},
        )

    def __enter__(self) -> "SuperLinkSession":
        try:
            self.process.start()
            self._await_health()
            self._register()
            self._grid = self._open_run()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the run and the SuperLink; a SuperLink that is already lost leaves nothing behind in this process."""
        if self._heartbeat is not None and self._heartbeat.is_running:
            self._heartbeat.stop()
        if self._runtime is not None:
            self._finish_run(self._runtime)
        if self._grid is not None:
            self._grid.close()
        self._heartbeat = self._runtime = self._grid = None
        self.process.stop()

    def _finish_run(self, runtime: Any) -> None:
        if self.process.running:
            with contextlib.suppress(httpx.HTTPError):  # the run ends with its SuperLink anyway
                runtime.PushTaskOutput(PushTaskOutputRequest(sub_status="completed", details=""))
        runtime.close()

    @property
    def grid(self) -> GuardedGrid:
        """Flower's grid of the open run.

        Raises:
          ConfigError: the link is closed.
        """
        if self._grid is None:
            raise ConfigError("link: closed; a link is used inside its with statement")
        return self._grid

    def node_ids(self) -> dict[str, int]:
        """Returns the ids of the nodes that are connected now, by site."""
        by_key = {bytes(node.public_key): int(node.node_id) for node in self.grid.get_nodes()}
        return {site: by_key[key] for site, key in self._keys.items() if key in by_key}

    def _await_health(self) -> None:
        until = time.monotonic() + START_SECONDS
        url = f"https://{self._place.local}/docs"
        # this path needs our secret: another SuperLink on this port would answer /health as well
        with http_client(verify=_context(self._ca), timeout=2.0) as client:
            while time.monotonic() < until:
                if not self.process.running:
                    break
                try:
                    if client.get(url, headers={HEADER: self._guard}).status_code == httpx.codes.OK:
                        return
                except httpx.HTTPError:
                    pass
                time.sleep(0.1)
        raise DataError(
            f"link={self._place.local}: Flower's SuperLink did not start ({self.process.reason()}); is the port "
            f"free? its log is {self._place.folder / 'superlink.log'}"
        )

    def _register(self) -> None:
        """Makes Flower's list of nodes equal to the federation's: new sites in, revoked sites out."""
        control = ControlClient.from_server_address(
            self._place.local,
            insecure=False,
            root_certificates=self._ca,
            interceptors=[Secret(self._guard), RuntimeVersionHttpInterceptor(component_name="flwr-cli")],
        )
        try:
            known = {
                bytes(node.public_key): node.node_id
                for node in control.ListNodes(ListNodesRequest()).nodes_info
                if node.status != "unregistered"
            }
            for key in known.keys() - set(self._keys.values()):
                control.UnregisterNode(UnregisterNodeRequest(node_id=known[key]))
            for site, key in self._keys.items():
                if key not in known:
                    control.RegisterNode(RegisterNodeRequest(public_key=key, name=site))
            for run_id, run in control.ListRuns(ListRunsRequest()).run_dict.items():
                if (
                    run.status.status != Status.FINISHED
                ):  # a run of a killed coordinator, whose messages nodes still take
                    control.StopRun(StopRunRequest(run_id=run_id))
            content, digest = bundle()
            self._run_id = control.StartRun(StartRunRequest(fab=fab_to_proto(Fab(digest, content, {})))).run_id
        finally:
            control.close()

    def _open_run(self) -> GuardedGrid:
        token = self._acquire()
        self._runtime = self._client(
            [RuntimeTokenHttpInterceptor(token)], None
        )  # no retries: heartbeats repeat by themselves
        pulled = self._runtime.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = pulled.task_id, pulled.run.run_id
        TaskIdentity.node_id = pulled.context.node_id
        self._heartbeat = HeartbeatSender(_beat(self._runtime))
        self._heartbeat.start()
        grid = GuardedGrid(self._place.local, self._ca, token=token, secret=self._guard, largest=self._largest)
        grid.set_run(Run.create_empty(run_id=pulled.run.run_id))
        return grid

    def _acquire(self) -> str:
        """Takes the task of the run that was just started; tasks of runs before a crash are left to expire."""
        auth = SuperExecAuthHttpInterceptor(master_secret=self._exec_secret, protected_methods=[_ACQUIRE])
        client = self._client([auth], retries())
        until = time.monotonic() + START_SECONDS
        try:
            while time.monotonic() < until:
                answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
                if answer.HasField("task") and answer.task.run_id == self._run_id:
                    return str(answer.token)
                time.sleep(0.1)
        finally:
            client.close()
        raise ConfigError("Flower's SuperLink gave no task for our run; is flwr 1.41 or 1.42 installed?")

    def _client(self, interceptors: list[Any], retries: RetryInvoker | None) -> Any:
        return RuntimeClient.from_server_address(
            server_address=self._place.local,
            insecure=False,
            root_certificates=self._ca,
            interceptors=[
                Secret(self._guard),
                RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"),
                *interceptors,
            ],
            retry_invoker=retries,
        )


def _beat(runtime: Any) -> Callable[[], bool]:
    """Returns a heartbeat; Flower's own interrupts the whole process when the SuperLink no longer knows the run."""

    def beat() -> bool:
        try:
            runtime.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True

    return beat


def _pem(line: str) -> bytes:
    """Returns an OpenSSH public key in the form in which Flower stores it."""
    return load_ssh_public_key(line.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _context(ca: bytes) -> Any:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca.decode("ascii"))
    return context
