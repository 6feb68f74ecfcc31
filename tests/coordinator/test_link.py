"""The contract that a Flower release has to pass at the coordinator: start, nodes, runs, guard, traces of a kill."""

import dataclasses
import os
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.common.constant import Status
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest, StopRunRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from offsite.client.network.node import Node, SuperNodeConfig
from offsite.coordinator.network.flower_grid import LOST, LOST_SECONDS, retries, why_lost
from offsite.coordinator.network.superlink_session import SuperLinkPlace, SuperLinkSession
from offsite.errors import ConfigError, DataError
from offsite.protos.flower_pieces import OTHER_BYTES
from offsite.protos.guard import Secret
from offsite.trust.addresses import with_port
from offsite.trust.certificates import create_authority, issue_server, new_key
from offsite.trust.keys import SiteKeys
from tests.faults.conftest import wait_for
from tests.ports import free_ports, has_ipv6

HANGS = 60.0  # seconds; a bound against hanging

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path) -> SuperLinkPlace:
    now, key = datetime.now(UTC), new_key()
    authority = create_authority("link", now=now)
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    (tmp_path / "server.key").write_bytes(key)
    (tmp_path / "server.pem").write_bytes(issue_server(authority, key, ["127.0.0.1"], now=now))
    files = (tmp_path / name for name in ("ca.pem", "server.pem", "server.key"))
    return SuperLinkPlace(tmp_path / "link", "127.0.0.1", free_ports(1)[0], *files)


def keys(folder: Path, *sites: str) -> dict[str, str]:
    made = {}
    for site in sites:
        path = folder / site
        made[site] = (SiteKeys.load(path) if path.exists() else SiteKeys.create(path, 1)).node_public()
    return made


def asked(place: SuperLinkPlace, ask: Callable[[ControlHttpClient], Any]) -> Any:
    control = ControlHttpClient.from_server_address(
        place.local,
        insecure=False,
        root_certificates=place.ca.read_bytes(),
        interceptors=[
            Secret((place.folder / "guard").read_text()),
            RuntimeVersionHttpInterceptor(component_name="flwr-cli"),
        ],
    )
    try:
        return ask(control)
    finally:
        control.close()


def unfinished(place: SuperLinkPlace) -> list[int]:
    runs = asked(place, lambda control: control.ListRuns(ListRunsRequest()).run_dict)
    return [run_id for run_id, run in runs.items() if run.status.status != Status.FINISHED]


def members(place: SuperLinkPlace) -> set[bytes]:
    nodes = asked(place, lambda control: control.ListNodes(ListNodesRequest()).nodes_info)
    return {bytes(node.public_key) for node in nodes if node.status != "unregistered"}


def test_it_starts_with_one_run_and_the_federations_nodes(place: SuperLinkPlace, tmp_path: Path) -> None:
    with SuperLinkSession(place, keys(tmp_path, "ash", "birch"), largest=OTHER_BYTES) as link:
        assert link.node_ids() == {}  # registered, not connected
        assert len(members(place)) == 2
        assert len(unfinished(place)) == 1
    with pytest.raises(ConfigError, match="link: closed"):
        _ = link.grid
    assert not link.process.running


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no loopback address of IPv6")
@pytest.mark.parametrize("bind", ["::1", "::"])
def test_a_site_connects_over_ipv6(place: SuperLinkPlace, tmp_path: Path, bind: str) -> None:
    now, key = datetime.now(UTC), new_key()
    authority = create_authority("link", now=now)
    place.ca.write_bytes(authority.certificate)
    place.key.write_bytes(key)
    place.certificate.write_bytes(issue_server(authority, key, ["::1"], now=now))
    place = dataclasses.replace(place, bind=bind)
    assert place.local == f"[::1]:{place.port}"
    nodes, ended = keys(tmp_path, "ash"), threading.Event()
    way = SuperNodeConfig(
        tmp_path / "node",
        with_port("::1", place.port),
        place.ca,
        SiteKeys.load(tmp_path / "ash").node,
        free_ports(1)[0],
    )
    node = Node(way, lambda stage, body: b"", largest=lambda: 0, note=lambda *_: None, stopping=ended.is_set)
    thread = threading.Thread(target=node.run)
    with SuperLinkSession(place, nodes, largest=OTHER_BYTES) as link:
        thread.start()
        try:
            wait_for(lambda: "ash" in link.node_ids(), HANGS)
        finally:
            ended.set()
            thread.join()


@pytest.mark.parametrize("path", ["/v1/control/list-runs", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/"])
def test_peers_without_the_secret_reach_the_fleet_only(place: SuperLinkPlace, tmp_path: Path, path: str) -> None:
    context = ssl.create_default_context(cadata=place.ca.read_text())
    with (
        SuperLinkSession(place, keys(tmp_path, "ash"), largest=OTHER_BYTES),
        httpx.Client(verify=context, base_url=f"https://{place.local}") as peer,
    ):
        assert peer.get("/health").status_code == httpx.codes.OK
        assert peer.post("/v1/fleet/pull-messages").status_code not in (httpx.codes.OK, httpx.codes.NOT_FOUND)
        for method in ("GET", "POST"):
            assert peer.request(method, path).status_code == httpx.codes.NOT_FOUND


def test_after_a_kill_the_old_run_is_ended_and_gone_sites_are_out(place: SuperLinkPlace, tmp_path: Path) -> None:
    link = SuperLinkSession(place, keys(tmp_path, "ash", "birch"), largest=OTHER_BYTES)
    with link:
        before, old = members(place), unfinished(place)
        assert link.process.pid is not None
        link.process._process.kill()  # type: ignore[union-attr]
        wait_for(lambda: not link.process.running, HANGS)
    with SuperLinkSession(place, keys(tmp_path, "birch", "cedar"), largest=OTHER_BYTES):
        assert len(members(place) & before) == 1
        assert len(members(place)) == 2
        assert len(unfinished(place)) == 1
        assert not set(unfinished(place)) & set(old)


def test_a_port_that_is_taken_is_said(place: SuperLinkPlace, tmp_path: Path) -> None:
    with SuperLinkSession(place, keys(tmp_path, "ash"), largest=OTHER_BYTES):
        second = dataclasses.replace(place, folder=tmp_path / "second")
        with pytest.raises(DataError, match=f"link=127.0.0.1:{place.port}: Flower's SuperLink did not start"):
            SuperLinkSession(second, keys(tmp_path, "ash"), largest=OTHER_BYTES).__enter__()


@pytest.fixture
def interrupts() -> Iterator[list[int]]:
    """Collects interrupts sent to this process; a coordinator would take them for interrupts by a person."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    yield seen
    signal.signal(signal.SIGINT, before)


def test_a_run_that_the_superlink_ended_is_a_lost_link_and_no_interrupt(
    place: SuperLinkPlace, tmp_path: Path, interrupts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's token has expired with its heartbeats, as after a minute's sleep of the machine."""
    monkeypatch.setattr("offsite.coordinator.network.flower_grid.LOST_SECONDS", 10 * HANGS)
    with SuperLinkSession(place, keys(tmp_path, "ash"), largest=OTHER_BYTES) as link:
        (run,) = unfinished(place)
        asked(place, lambda control: control.StopRun(StopRunRequest(run_id=run)))
        began = time.monotonic()
        with pytest.raises(LOST) as caught:  # at once, and not after tries for all of those seconds
            link.node_ids()
        assert why_lost(caught.value) == "it ended our run; was this machine asleep for a minute"
        assert link._heartbeat is not None
        assert link._heartbeat.heartbeat_fn() is False
        assert link.process.running
    assert time.monotonic() - began < HANGS
    assert interrupts == []
    with SuperLinkSession(place, keys(tmp_path, "ash"), largest=OTHER_BYTES) as again:
        assert again.node_ids() == {}


def test_a_superlink_that_died_leaves_no_heartbeat_behind(place: SuperLinkPlace, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with SuperLinkSession(place, keys(tmp_path, "ash"), largest=OTHER_BYTES) as link:
        heartbeat = link._heartbeat
        assert heartbeat is not None
        assert heartbeat.is_running
        os.kill(link.process.pid or 0, signal.SIGKILL)
        wait_for(lambda: not link.process.running, HANGS)
        assert heartbeat.heartbeat_fn() is False
    assert not heartbeat.is_running
    assert set(threading.enumerate()) <= before


def answering(status: int) -> Callable[[], None]:
    def call() -> None:
        request = httpx.Request("POST", "https://127.0.0.1/v1/runtime/pull-messages")
        httpx.Response(status, request=request, json={"detail": "no"}).raise_for_status()

    return call


@pytest.mark.parametrize("status", [401, 403, 404, 413, 500])
def test_an_answer_that_stays_is_tried_once(status: int, interrupts: list[int]) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(status)
        answering(status)()

    with pytest.raises(LOST, match=str(status)) as caught:
        retries().invoke(call)
    assert why_lost(caught.value) in (
        "it ended our run; was this machine asleep for a minute",
        f"it answered {status}",
    )
    assert (calls, interrupts) == ([status], [])


@pytest.mark.parametrize("call", [answering(503), lambda: (_ for _ in ()).throw(httpx.ConnectError("refused"))])
def test_no_call_is_tried_for_ever(call: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("flwr.supercore.retry.retry_invoker.time.monotonic", lambda: now[0])
    tried = retries()
    tried.wait_function = lambda seconds: now.__setitem__(0, now[0] + seconds + 0.01)
    with pytest.raises(LOST):
        tried.invoke(call)
    assert LOST_SECONDS <= now[0] < LOST_SECONDS + 1
