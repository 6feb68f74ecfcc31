"""The way between a coordinator and a site, as real programs: proxies on it, and messages that swell at its end."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from offsite.client.home.installation import SiteHome
from offsite.client.network.node import Node
from offsite.client.service.doctor import FINE, examine
from offsite.client.service.site_runtime import SiteRuntime
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.coordinator.network.flower_exchange import GridExchange, call
from offsite.coordinator.network.superlink_session import SuperLinkSession
from offsite.coordinator.rounds.exchange import Exchange
from offsite.coordinator.service import _depot, link_place
from offsite.protos.flower import pack
from offsite.protos.flower_pieces import OTHER_BYTES
from tests.faults.conftest import wait_for
from tests.faults.joined import DIGEST, PACKAGE, joined, now
from tests.faults.proxy import RecordingProxy

IDENTITY = ("_task_id", "_run_id", "_node_id")


@dataclass
class World:
    """A coordinator whose ports are open, and sites that have joined.

    Attributes:
      home: folder of the coordinator.
      site: folder of a site, whose node runs all the time.
      other: folder of another site.
      link: open link of the coordinator.
      proxy: proxy that the environment of all programs names.
      identity: the coordinator's identity towards Flower, which a site in the same process changes.
    """

    home: CoordinatorHome
    site: SiteHome
    other: SiteHome
    link: SuperLinkSession
    proxy: RecordingProxy
    identity: tuple[Any, ...]
    heard: list[bytes] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    @contextmanager
    def node(self, site: SiteHome) -> Iterator[Exchange]:
        """Runs a SuperNode of a site, which keeps what it hears, and yields the coordinator's way to it."""
        runtime, stopping = SiteRuntime.of(SiteHome.open(site.folder), now), threading.Event()
        node = Node(
            runtime.supernode(),
            self._answer,
            largest=lambda: OTHER_BYTES,
            note=lambda kind, reason: self.notes.append((kind, reason)),
            stopping=stopping.is_set,
        )
        thread = threading.Thread(target=node.run)
        thread.start()
        try:
            wait_for(lambda: runtime.name in self.link.node_ids(), 60)
            yield GridExchange(self.link.grid, nodes=self.link.node_ids, deadline=60.0)
        finally:
            stopping.set()
            thread.join()

    def sends(self, way: Exchange, stage: str, body: bytes, site: str = "ash") -> bytes:
        """Returns the answer to a question."""
        self.be_coordinator()
        return way.send(stage, {site: body})[site]

    def sends_record(self, content: RecordDict) -> dict[str, bytes]:
        """Returns the answer to a record of Flower's that is no honest stage."""
        self.be_coordinator()
        message = Message(content=content, dst_node_id=self.link.node_ids()["ash"], message_type="train")
        return call(self.link.grid, {"ash": message}, 60.0)

    def be_coordinator(self) -> None:
        for name, value in zip(IDENTITY, self.identity, strict=True):
            setattr(TaskIdentity, name, value)

    def _answer(self, stage: str, body: bytes) -> bytes:
        self.heard.append(body)
        return body[::-1]

    def fetched(self, site: SiteHome, target: Path) -> bytes:
        """Returns the package that a site has fetched."""
        runtime = SiteRuntime.of(SiteHome.open(site.folder), now)
        return runtime.fetch(DIGEST, len(PACKAGE), target, lambda count: None).read_bytes()

    def findings(self, site: SiteHome) -> dict[str, tuple[str, str]]:
        """Returns state and line of the doctor's checks."""
        found = examine(SiteHome.open(site.folder), now)
        return {finding.check: (finding.state, finding.detail) for finding in found}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, proxy = tmp_path_factory.mktemp("proxies"), RecordingProxy()
    home, (site, other, _) = joined(folder)
    nodes = {member.site: member.node for member in home.federation().members}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in proxy.environment().items():
            environment.setenv(name, value)
        with _depot(home, now), SuperLinkSession(link_place(home), nodes, largest=OTHER_BYTES) as session:
            yield World(home, site, other, session, proxy, tuple(getattr(TaskIdentity, name) for name in IDENTITY))
    proxy.close()


@pytest.fixture(scope="module")
def way(world: World) -> Iterator[Exchange]:
    """The coordinator's way to a node of `ash`."""
    with world.node(world.site) as exchange:
        yield exchange


def test_nothing_goes_to_the_proxy_that_the_environment_names(world: World, way: Exchange, tmp_path: Path) -> None:
    """Nine variables in both cases, and the two of gRPC by address; the exceptions name another host."""
    assert world.sends(way, "offer", b"question") == b"noitseuq"
    assert world.fetched(world.site, tmp_path / "package") == PACKAGE
    findings = world.findings(world.site)
    assert {findings[check][0] for check in ("proxy", "link", "depot", "clock")} == {FINE}
    assert world.proxy.heads == []
    line = findings["proxy"][1]
    assert line.startswith("straight to the coordinator; not used: ALL_PROXY, ")
    assert all(name in line for name in world.proxy.environment())
    assert "127.0.0.1" not in line  # a value can hold a password


def test_the_proxy_of_the_sites_settings_is_the_way_to_the_coordinator_alone(world: World, tmp_path: Path) -> None:
    """The environment names another proxy; tunnels to the coordinator's two ports are all that is asked for."""
    own, site = RecordingProxy(), world.other
    through, path = own.address.replace("//", "//ash:se%20cret@"), site.folder / "site.toml"
    path.write_text(re.sub(r'(?m)^proxy = ""$', f'proxy = "{through}"', path.read_text()))
    with world.node(site) as way:
        assert world.sends(way, "offer", b"question", "birch") == b"noitseuq"
    nodes = len(own.heads)
    assert world.fetched(site, tmp_path / "package") == PACKAGE
    assert len(own.heads) > nodes > 0
    findings = world.findings(site)
    own.close()
    assert {findings[check][0] for check in ("proxy", "link", "depot", "clock")} == {FINE}
    assert findings["proxy"][1].startswith(f"through 127.0.0.1:{own.port}, which site.toml names; not used: ")
    ports = [int(re.match(rb"CONNECT 127\.0\.0\.1:(\d+) HTTP", head)[1]) for head in own.heads]  # type: ignore[index]
    assert set(ports) == {world.home.settings.link_port, world.home.settings.depot_port}
    assert all(re.search(rb"(?i)proxy-authorization: basic YXNoOnNlIGNyZXQ=\r", head) for head in own.heads)
    assert world.proxy.heads == []


def test_a_message_of_one_megabyte_does_not_become_half_a_gigabyte(world: World, way: Exchange) -> None:
    """An array names one piece 500 times; the site refuses the message by its sum, and hears the next one."""
    arrays = ArrayRecord({"flat": Array(np.zeros(1 << 20, dtype=np.uint8))})
    arrays["flat"].__dict__["_chunks"] = arrays["flat"].slice_array() * 500
    swelling = RecordDict({"stage": ConfigRecord({"name": "train"}), "body": arrays})
    honest = bytes(OTHER_BYTES)  # zeros, so its pieces are one piece that is named many times
    world.heard.clear()
    world.notes.clear()
    assert world.sends_record(swelling) == {}
    assert world.sends(way, "train", honest) == honest
    assert world.heard == [honest]
    ((kind, reason),) = world.notes
    assert kind == "message refused"
    assert int(re.match(r"bytes=(\d+): at most", reason)[1]) > 500 << 20  # type: ignore[index]


def test_bytes_that_do_not_make_a_stage_are_refused_and_noted(world: World, way: Exchange) -> None:
    """A file of numpy's that names a terabyte, and is 100 bytes long."""
    array = pack("train", bytes(1 << 17)).array_records["body"]["flat"]
    lying = Array(array.dtype, array.shape, array.stype, array.data[:128].replace(b"(131072,)", b"(1 << 40,)"))
    world.heard.clear()
    world.notes.clear()
    record = RecordDict({"stage": ConfigRecord({"name": "train"}), "body": ArrayRecord({"flat": lying})})
    assert world.sends_record(record) == {}
    assert world.sends(way, "offer", b"next") == b"txen"
    assert world.heard == [b"next"]
    assert [kind for kind, _ in world.notes] == ["message refused"]
