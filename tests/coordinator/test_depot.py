"""The depot against real gRPC clients over TLS on loopback: its answers, its permissions, and its costs."""

import contextlib
import hashlib
import resource
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

import offsite.client.network.fetch
import offsite.coordinator.network.depot
from offsite.coordinator.network.depot import BUSY, CHUNK, MAX_OF_ONE, MAX_REQUESTS, WORKERS, Depot, Tls
from offsite.errors import DataError, Untrusted
from offsite.protos import depot_pb2 as wire
from offsite.protos import depot_pb2_grpc as stubs
from offsite.protos.flower_process import OPEN_FILES
from offsite.trust.certificates import (
    Authority,
    certificate_key,
    create_authority,
    issue_client,
    issue_server,
    make_request,
    new_key,
)

NOW = datetime.now(UTC)
SIZE = 2 * CHUNK + 12345
CONTENT = bytes(range(256)) * (SIZE // 256) + bytes(SIZE % 256)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
HANGS = 120.0  # seconds; a bound against hanging
Pair = tuple[bytes, bytes]  # certificate and key


def client_pair(ca: Authority, name: str, *, now: datetime = NOW) -> Pair:
    key = new_key()
    return issue_client(ca, make_request(key, name), name, now=now, days=10), key


@dataclass
class World:
    """A running depot, two members, and the set of permitted peers."""

    folder: Path
    ca: Authority
    server: Pair
    port: int
    ash: Pair
    birch: Pair
    members: set[str]
    trouble: Exception | None = None

    def allowed(self, certificate: bytes) -> None:
        if self.trouble is not None:
            raise self.trouble
        if certificate_key(certificate) not in self.members:
            raise Untrusted("tls=...: no member has this key; was it revoked?")

    def channel(self, pair: Pair | tuple[None, None]) -> grpc.Channel:
        certificate, key = pair
        credentials = grpc.ssl_channel_credentials(self.ca.certificate, key, certificate)
        return grpc.secure_channel(f"127.0.0.1:{self.port}", credentials)

    def get(
        self, pair: Pair | tuple[None, None], digest: str = DIGEST, offset: int = 0, chunk: int = 0
    ) -> list[wire.Chunk]:
        with self.channel(pair) as channel:
            request = wire.GetRequest(sha256=digest, offset=offset, chunk=chunk)
            return list(stubs.DepotStub(channel).Get(request, timeout=10))

    def describe(self, pair: Pair | tuple[None, None], digest: str = DIGEST) -> wire.Description:
        with self.channel(pair) as channel:
            return stubs.DepotStub(channel).Describe(wire.DescribeRequest(sha256=digest), timeout=10)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    ca, key = create_authority("authority", now=NOW), new_key()
    server = issue_server(ca, key, ["127.0.0.1"], now=NOW), key
    ash, birch = client_pair(ca, "ash"), client_pair(ca, "birch")
    folder = tmp_path / "depot"
    folder.mkdir()
    (folder / DIGEST).write_bytes(CONTENT)
    members = {certificate_key(ash[0]), certificate_key(birch[0])}
    one = World(folder, ca, server, 0, ash, birch, members)
    depot = Depot(folder, address="127.0.0.1:0", tls=Tls(ca.certificate, *server), allowed=one.allowed)
    one.port = depot.start()
    yield one
    depot.stop()


@contextlib.contextmanager
def served_anew(world: World) -> Iterator[None]:
    """Runs another depot over the same folder, under the limits that hold now."""
    depot = Depot(
        world.folder, address="127.0.0.1:0", tls=Tls(world.ca.certificate, *world.server), allowed=world.allowed
    )
    world.port = depot.start()
    try:
        yield
    finally:
        depot.stop()


def refused(call: object, *arguments: object, **named: object) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **named)  # type: ignore[operator]
    return caught.value.code()


@pytest.mark.parametrize("offset", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, SIZE - 1, SIZE])
def test_every_offset_gives_the_rest_of_the_file(world: World, offset: int) -> None:
    chunks = world.get(world.ash, offset=offset)
    assert b"".join(chunk.data for chunk in chunks) == CONTENT[offset:]
    at = offset
    for chunk in chunks:
        assert (chunk.offset, chunk.crc32) == (at, zlib.crc32(CONTENT[at : at + len(chunk.data)]))
        assert 0 < len(chunk.data) <= CHUNK
        at += len(chunk.data)


def test_beyond_the_end_is_refused(world: World) -> None:
    assert refused(world.get, world.ash, offset=SIZE + 1) == grpc.StatusCode.OUT_OF_RANGE


def test_a_description_says_what_the_file_is(world: World) -> None:
    described = world.describe(world.ash)
    assert (described.sha256, described.size, described.chunk) == (DIGEST, SIZE, CHUNK)


@pytest.mark.parametrize(("wanted", "given"), [(1, 1 << 10), (5000, 5000), (CHUNK, CHUNK), (2**32 - 1, CHUNK)])
def test_a_peer_may_ask_for_smaller_chunks_but_not_for_larger_ones(world: World, wanted: int, given: int) -> None:
    chunks = world.get(world.ash, offset=SIZE - 2 * CHUNK, chunk=wanted)
    assert {len(chunk.data) for chunk in chunks[:-1]} == {given}
    assert b"".join(chunk.data for chunk in chunks) == CONTENT[SIZE - 2 * CHUNK :]


@pytest.mark.parametrize(
    "name",
    ["", "../secret", "..", "/etc/hostname", DIGEST.upper(), DIGEST[:-1], DIGEST + "\n", f"./{DIGEST}", "f" * 64],
)
def test_only_whole_digests_are_names(world: World, name: str) -> None:
    (world.folder.parent / "secret").write_text("private")
    (world.folder / DIGEST[:-1]).write_text("another file of the folder")
    assert refused(world.get, world.ash, name) == grpc.StatusCode.NOT_FOUND
    assert refused(world.describe, world.ash, name) == grpc.StatusCode.NOT_FOUND


def test_without_a_good_certificate_there_is_no_connection(world: World) -> None:
    """TLS itself refuses these peers, each for a reason of its own; a member gets in by the same way."""
    stranger = create_authority("authority", now=NOW)
    for pair in (
        (None, None),
        client_pair(stranger, "ash"),
        client_pair(world.ca, "ash", now=NOW - timedelta(days=30)),
        client_pair(world.ca, "ash", now=NOW + timedelta(days=30)),
        world.server,
    ):
        assert refused(world.get, pair) == grpc.StatusCode.UNAVAILABLE
        assert refused(world.describe, pair) == grpc.StatusCode.UNAVAILABLE
    assert world.describe(world.birch).size == SIZE


def test_a_certificate_of_the_authority_is_not_enough(world: World) -> None:
    """The name is a member's and the authority is right, but the owners never signed the key."""
    assert refused(world.get, client_pair(world.ca, "ash")) == grpc.StatusCode.PERMISSION_DENIED
    assert refused(world.describe, client_pair(world.ca, "ash")) == grpc.StatusCode.PERMISSION_DENIED


def test_a_revoked_site_gets_no_further_answer_on_an_open_connection(world: World) -> None:
    with world.channel(world.ash) as channel:
        depot = stubs.DepotStub(channel)
        assert depot.Describe(wire.DescribeRequest(sha256=DIGEST), timeout=10).size == SIZE
        world.members.remove(certificate_key(world.ash[0]))
        assert refused(depot.Describe, wire.DescribeRequest(sha256=DIGEST)) == grpc.StatusCode.PERMISSION_DENIED
        assert refused(lambda: list(depot.Get(wire.GetRequest(sha256=DIGEST)))) == grpc.StatusCode.PERMISSION_DENIED
    assert len(world.get(world.birch)) == 3


def test_trouble_at_the_coordinator_lets_nobody_in_and_tells_no_path(world: World) -> None:
    world.trouble = DataError("home='/secret/place': not readable")
    with pytest.raises(grpc.RpcError) as caught:
        world.get(world.ash)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "secret" not in str(caught.value.details())
    world.trouble = ValueError("a bug")
    assert refused(world.get, world.ash) == grpc.StatusCode.UNKNOWN


def test_a_large_file_costs_no_memory(world: World) -> None:
    """200 MB pass through server and client in this one process; the reader is slow, so that a queue would grow."""
    name = "a" * 64
    with (world.folder / name).open("wb") as file:
        file.truncate(200 << 20)
    me = psutil.Process()
    with world.channel(world.ash) as channel:
        before, most, moved = me.memory_info().rss, 0, 0
        for number, chunk in enumerate(stubs.DepotStub(channel).Get(wire.GetRequest(sha256=name))):
            moved += len(chunk.data)
            if number % 10 == 0:
                time.sleep(0.02)
                most = max(most, me.memory_info().rss - before)
    assert moved == 200 << 20
    assert most < 40 << 20


def test_abandoned_transfers_use_up_no_threads(world: World) -> None:
    """A site that asks over and over and reads nothing, as after partitions, blocks no other site."""
    with (world.folder / ("b" * 64)).open("wb") as file:
        file.truncate(50 << 20)
    with world.channel(world.ash) as channel:
        request = wire.GetRequest(sha256="b" * 64)
        streams = [stubs.DepotStub(channel).Get(request) for _ in range(WORKERS + 6)]
        assert b"".join(chunk.data for chunk in world.get(world.birch)) == CONTENT
        codes = [read_to_its_end(stream) for stream in streams]
    assert codes.count(grpc.StatusCode.OK) <= 1  # only the last of several simultaneous transfers survives
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED}


def read_to_its_end(stream: Any) -> grpc.StatusCode:
    with contextlib.suppress(grpc.RpcError):
        for _ in stream:
            pass
    return stream.code()


def test_a_port_in_use_is_said(world: World) -> None:
    tls = Tls(world.ca.certificate, *world.server)
    second = Depot(world.folder, address=f"127.0.0.1:{world.port}", tls=tls, allowed=world.allowed)
    with pytest.raises(DataError, match="port in use"):
        second.start()


def test_it_stops_at_once_with_a_transfer_open(world: World) -> None:
    tls = Tls(world.ca.certificate, *world.server)
    assert "PRIVATE KEY" not in repr(tls)
    with (world.folder / ("c" * 64)).open("wb") as file:
        file.truncate(50 << 20)
    depot = Depot(world.folder, address="127.0.0.1:0", tls=tls, allowed=world.allowed)
    world.port = depot.start()
    with world.channel(world.ash) as channel:
        stream = stubs.DepotStub(channel).Get(wire.GetRequest(sha256="c" * 64))
        assert next(stream).offset == 0
        stopping = threading.Thread(target=depot.stop, daemon=True)
        stopping.start()
        stopping.join(HANGS)  # nobody reads the transfer on, so a stop that waits for its end has none
        assert not stopping.is_alive()
        assert refused(lambda: list(stream)) in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def silent(channel: grpc.Channel) -> object:
    """Begins a request and never sends its content."""
    begun = channel.stream_stream("/offsite.depot.v1.Depot/Get", None, None)
    return begun(iter(threading.Event().wait, True))


def test_requests_beyond_a_number_are_sent_away_and_not_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offsite.coordinator.network.depot, "WORKERS", 1)
    monkeypatch.setattr(offsite.coordinator.network.depot, "MAX_REQUESTS", 3)
    monkeypatch.setattr(offsite.coordinator.network.depot, "REQUEST_SECONDS", 60 * HANGS)
    with served_anew(world), world.channel(world.ash) as channel:
        calls = [silent(channel) for _ in range(3)]
        until = time.monotonic() + HANGS
        while (code := describes(world)) != grpc.StatusCode.RESOURCE_EXHAUSTED and time.monotonic() < until:
            time.sleep(0.05)
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in calls:
            call.cancel()  # type: ignore[attr-defined]
        assert world.describe(world.birch).size == SIZE


def test_a_site_that_asks_for_nothing_holds_no_worker(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revoked site is refused at once; a silent member is dropped after some seconds."""
    monkeypatch.setattr(offsite.coordinator.network.depot, "REQUEST_SECONDS", 1)
    monkeypatch.setattr(offsite.coordinator.network.depot, "WORKERS", 2)
    with served_anew(world), world.channel(world.ash) as channel:
        members = [silent(channel) for _ in range(2)]
        assert [read_to_its_end(call) for call in members] == [grpc.StatusCode.CANCELLED] * 2
        monkeypatch.setattr(offsite.coordinator.network.depot, "REQUEST_SECONDS", 60)
        world.members.discard(certificate_key(world.ash[0]))
        revoked = [silent(channel) for _ in range(5)]
        assert [read_to_its_end(call) for call in revoked] == [grpc.StatusCode.PERMISSION_DENIED] * 5
        assert world.describe(world.birch).size == SIZE


def test_one_site_cannot_hold_what_all_have_together(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site sends more silent requests than the depot takes from all sites; a neighbour is still answered."""
    monkeypatch.setattr(offsite.coordinator.network.depot, "REQUEST_SECONDS", 60 * HANGS)
    with world.channel(world.ash) as channel:
        calls = [silent(channel) for _ in range(MAX_REQUESTS + 20)]
        until = time.monotonic() + HANGS
        while (code := describes(world)) != grpc.StatusCode.OK and time.monotonic() < until:
            time.sleep(0.05)
        assert code == grpc.StatusCode.OK
        with pytest.raises(grpc.RpcError) as caught:
            world.describe(world.ash)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert offsite.client.network.fetch._passing(caught.value) == caught.value.details()  # it tries again
        for call in calls:
            call.cancel()  # type: ignore[attr-defined]
    assert comes_in_again(world)


def test_a_request_counts_until_it_ends_in_any_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that were answered, refused, called off, silent or cut off no longer count against the site."""
    monkeypatch.setattr(offsite.coordinator.network.depot, "REQUEST_SECONDS", 1)
    for _ in range(MAX_OF_ONE + 2):
        assert retried(lambda: world.describe(world.ash)) == grpc.StatusCode.OK
        assert retried(lambda: world.describe(world.ash, "f" * 64)) == grpc.StatusCode.NOT_FOUND
        assert retried(lambda: world.get(world.ash, offset=SIZE + 1)) == grpc.StatusCode.OUT_OF_RANGE
        assert retried(lambda: world.get(world.ash)) == grpc.StatusCode.OK
    with world.channel(world.ash) as channel:
        given_up = [silent(channel) for _ in range(MAX_OF_ONE)]
        assert {read_to_its_end(call) for call in given_up} == {grpc.StatusCode.CANCELLED}
    assert comes_in_again(world)
    with world.channel(world.ash) as channel:
        for _ in range(MAX_OF_ONE):
            silent(channel)
    assert comes_in_again(world)


def test_the_words_for_a_full_hand_are_those_that_a_site_knows() -> None:
    assert offsite.client.network.fetch._BUSY in BUSY


def retried(call: Callable[[], object]) -> grpc.StatusCode:
    """Returns the result of a call with a site's retries; the server counts an ended call longer than the peer does."""
    until = time.monotonic() + HANGS
    while True:
        try:
            call()
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED or time.monotonic() > until:
                return error.code()  # type: ignore[no-any-return]
            time.sleep(0.05)
        else:
            return grpc.StatusCode.OK


def comes_in_again(world: World) -> bool:
    return retried(lambda: world.describe(world.ash)) == grpc.StatusCode.OK


def describes(world: World) -> grpc.StatusCode:
    with world.channel(world.birch) as channel:
        try:
            stubs.DepotStub(channel).Describe(wire.DescribeRequest(sha256=DIGEST), timeout=0.5)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_more_requests_may_wait_than_are_answered_at_once() -> None:
    assert MAX_REQUESTS > WORKERS


def test_strangers_hold_no_worker_and_are_disconnected(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that never finish TLS, more than the depot has workers, block nobody and are closed."""
    monkeypatch.setattr(offsite.coordinator.network.depot, "HANDSHAKE_SECONDS", 2)
    monkeypatch.setattr(offsite.coordinator.network.depot, "WORKERS", 1)
    tls = Tls(world.ca.certificate, *world.server)
    depot = Depot(world.folder, address="127.0.0.1:0", tls=tls, allowed=world.allowed)
    world.port = depot.start()
    strangers = [socket.create_connection(("127.0.0.1", world.port), timeout=20) for _ in range(20)]
    assert b"".join(chunk.data for chunk in world.get(world.ash)) == CONTENT
    for one in strangers:
        while one.recv(4096):  # until the depot hangs up
            pass
        one.close()
    depot.stop()


def test_the_soft_limit_of_open_files_is_raised(world: World) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    tls = Tls(world.ca.certificate, *world.server)
    second = Depot(world.folder, address="127.0.0.1:0", tls=tls, allowed=world.allowed)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        second.start()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, OPEN_FILES), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        second.stop()
