"""Fetching over TLS on loopback: killed, cut off, slowed, lied to, out of disk; the file is right or there is none."""

import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

import offsite.client.network.fetch
import offsite.coordinator.network.depot
from offsite.client.network.fetch import IDLE_SECONDS, DepotAddress, fetch
from offsite.coordinator.network.depot import CHUNK, Depot, Tls
from offsite.errors import DataError, DigestMismatch, Untrusted
from offsite.protos import depot_pb2 as wire
from offsite.protos import depot_pb2_grpc as stubs
from offsite.trust.addresses import with_port
from offsite.trust.certificates import create_authority, issue_client, issue_server, make_request, new_key
from tests.ports import has_ipv6

NOW = datetime.now(UTC)
SIZE = 8 * CHUNK + 777
CONTENT = random.Random(7).randbytes(SIZE)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Wire:
    """A TCP relay in front of a depot, which counts its bytes: a slow link, a cut, a stall, a flipped bit."""

    def __init__(self, port: int) -> None:
        self.to, self.rate, self.down, self.connections = port, 0.0, 0, 0
        self.cut_after = self.stall_after = self.flip_after = SIZE * 1000
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        for one in self._sockets:
            shut(one)
            one.close()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
            try:
                far = socket.create_connection(("127.0.0.1", self.to))
            except OSError:
                near.close()
                continue
            self.connections += 1
            self._sockets += [near, far]
            for source, target, counted in ((near, far, False), (far, near, True)):
                thread = threading.Thread(target=self._pump, args=(source, target, counted), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(16384):
                target.sendall(self._pass(data, source) if counted else data)
        except OSError:
            pass
        shut(source)
        shut(target)

    def _pass(self, data: bytes, source: socket.socket) -> bytes:
        self.down += len(data)
        if self.rate:
            time.sleep(len(data) / self.rate)
        if self.down > self.cut_after:
            self.cut_after = SIZE * 1000
            raise OSError
        if self.down > self.stall_after:
            self.stall_after = SIZE * 1000
            while source.fileno() != -1:  # nothing moves on this connection any more, and nobody closes it
                time.sleep(0.05)
        if self.down > self.flip_after:
            self.flip_after = SIZE * 1000
            return bytes([data[0] ^ 1]) + data[1:]
        return data


def shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


@dataclass
class World:
    """A depot behind a relay, and a site's way to it."""

    folder: Path
    tls: Tls
    cert: bytes
    key: bytes
    refuse: bool = False

    depot: Depot = field(init=False)
    wire: Wire = field(init=False)

    def address(self, **other: Any) -> DepotAddress:
        fields = {"host": "127.0.0.1", "port": self.wire.port, "ca": self.tls.ca, "cert": self.cert, "key": self.key}
        return DepotAddress(**(fields | other))

    def allowed(self, _: bytes) -> None:
        if self.refuse:
            raise Untrusted("tls=...: no member has this key; was it revoked?")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(offsite.client.network.fetch, "BACKOFF_SECONDS", (0.05, 0.4))
    ca, key, own = create_authority("authority", now=NOW), new_key(), new_key()
    tls = Tls(ca.certificate, issue_server(ca, key, ["127.0.0.1"], now=NOW), key)
    cert = issue_client(ca, make_request(own, "ash"), "ash", now=NOW)
    folder = tmp_path / "depot"
    folder.mkdir()
    (folder / DIGEST).write_bytes(CONTENT)
    one = World(folder, tls, cert, own)
    one.depot = Depot(folder, address="127.0.0.1:0", tls=tls, allowed=one.allowed)
    one.wire = Wire(one.depot.start())
    yield one
    one.wire.close()
    one.depot.stop()


def ignore(_: int) -> None:
    pass


def partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


# --- the package arrives


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no loopback address of IPv6")
@pytest.mark.parametrize("host", ["::1", "0:0:0:0:0:0:0:1"])
def test_a_file_arrives_over_ipv6(world: World, tmp_path: Path, host: str) -> None:
    ca, key = create_authority("authority", now=NOW), new_key()
    tls = Tls(ca.certificate, issue_server(ca, key, [host], now=NOW), key)
    cert = issue_client(ca, make_request(world.key, "ash"), "ash", now=NOW)
    depot = Depot(world.folder, address=with_port(host, 0), tls=tls, allowed=world.allowed)
    address = DepotAddress(host, depot.start(), ca.certificate, cert, world.key)
    try:
        target = fetch(address, DIGEST, SIZE, tmp_path / "package", on_bytes=ignore)
        assert target.read_bytes() == CONTENT
    finally:
        depot.stop()


def test_a_file_arrives_and_is_not_fetched_twice(world: World, tmp_path: Path) -> None:
    target, seen = tmp_path / "package", []
    assert fetch(world.address(), DIGEST, SIZE, target, on_bytes=seen.append) == target
    assert target.read_bytes() == CONTENT
    assert not partial(target).exists()
    assert seen == sorted(seen)
    assert seen[-1] == SIZE
    carried = world.wire.down
    assert fetch(world.address(), DIGEST, SIZE, target, on_bytes=ignore) == target
    assert world.wire.down == carried


def test_a_changed_file_at_the_target_is_fetched_again(world: World, tmp_path: Path) -> None:
    target = tmp_path / "package"
    target.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    fetch(world.address(), DIGEST, SIZE, target, on_bytes=ignore)
    assert target.read_bytes() == CONTENT


def child(world: World, target: Path, before: str = "") -> subprocess.Popen[str]:
    """Starts a process that fetches and prints the outcome."""
    address = world.address()
    files = {name: target.parent / f"{name}.pem" for name in ("ca", "cert", "key")}
    for name, path in files.items():
        path.write_bytes(getattr(address, name))
    code = f"""
import resource, signal
from pathlib import Path
from offsite.client.network.fetch import DepotAddress, fetch
{before}
pems = [Path(name).read_bytes() for name in {[str(path) for path in files.values()]!r}]
source = DepotAddress("127.0.0.1", {address.port}, *pems)
try:
    fetch(source, {DIGEST!r}, {SIZE}, Path({str(target)!r}), on_bytes=lambda n: None)
    print("whole")
except Exception as error:
    print(type(error).__name__, error)
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())


def test_killed_three_times_it_goes_on_where_it_was(world: World, tmp_path: Path) -> None:
    target = tmp_path / "package"
    world.wire.rate = 4e6
    here = []
    for share in (0.2, 0.45, 0.7):
        process = child(world, target)
        while not partial(target).exists() or partial(target).stat().st_size < share * SIZE:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        content = partial(target).read_bytes()
        assert CONTENT.startswith(content)
        here.append(len(content))
    assert here == sorted(set(here))
    assert here[-1] < SIZE
    assert not target.exists()
    assert child(world, target).communicate(timeout=300)[0] == "whole\n"
    assert target.read_bytes() == CONTENT
    # each kill loses the bytes on their way: one chunk not yet whole, and those read ahead by gRPC and the kernel
    assert world.wire.down < SIZE + 3 * 4 * CHUNK


def test_a_cut_and_a_flipped_bit_on_the_wire_are_got_over(world: World, tmp_path: Path) -> None:
    world.wire.cut_after, world.wire.flip_after = 2 * CHUNK, 5 * CHUNK
    target = tmp_path / "package"
    fetch(world.address(), DIGEST, SIZE, target, on_bytes=ignore)
    assert target.read_bytes() == CONTENT
    assert world.wire.connections == 3


def test_a_link_that_stands_still_is_left_for_a_new_one(world: World, tmp_path: Path) -> None:
    """As in a partition: no byte, no reset; only the idle time says so."""
    world.wire.stall_after = 3 * CHUNK
    target = tmp_path / "package"
    began = time.monotonic()
    fetch(world.address(), DIGEST, SIZE, target, on_bytes=ignore, idle=1.0)
    assert target.read_bytes() == CONTENT
    assert world.wire.connections == 2
    assert 1.0 < time.monotonic() - began < IDLE_SECONDS


def test_a_slow_link_is_never_given_up_while_bytes_move(world: World, tmp_path: Path) -> None:
    """50 kB/s with an idle time of 60 s, some 20 times faster: 1.2 MB/s and 3 s, more than two of which it takes."""
    world.wire.rate = 1.2e6
    target = tmp_path / "package"
    began = time.monotonic()
    fetch(world.address(), DIGEST, SIZE, target, on_bytes=ignore, idle=3.0)
    assert time.monotonic() - began > 2 * 3.0
    assert target.read_bytes() == CONTENT
    assert world.wire.connections == 1


def test_a_link_too_slow_for_a_chunk_gets_smaller_ones(world: World, tmp_path: Path) -> None:
    """At 400 kB/s this file, one chunk, takes 1.5 s; after 0.6 s without a chunk the link counts as idle."""
    world.wire.rate = 4e5
    content = CONTENT[:600_000]
    digest = hashlib.sha256(content).hexdigest()
    (world.folder / digest).write_bytes(content)
    target, seen = tmp_path / "package", []
    fetch(world.address(), digest, len(content), target, on_bytes=seen.append, idle=0.6, patience=8.0)
    assert target.read_bytes() == content
    assert seen[0] < 0.6 * 4e5


def test_a_depot_that_comes_back_is_waited_for(world: World, tmp_path: Path) -> None:
    target, port = tmp_path / "package", world.wire.to
    world.depot.stop()
    again = Depot(world.folder, address=f"127.0.0.1:{port}", tls=world.tls, allowed=world.allowed)
    starter = threading.Timer(0.7, again.start)
    starter.start()
    fetch(world.address(), DIGEST, SIZE, target, on_bytes=ignore, patience=20)
    starter.join()
    again.stop()
    assert target.read_bytes() == CONTENT


# --- the package does not arrive, and the error says why


def test_a_depot_that_is_gone_is_given_up_after_the_patience(world: World, tmp_path: Path) -> None:
    world.depot.stop()
    with pytest.raises(DataError, match=r"no byte came for 0\.3 s"):
        fetch(world.address(), DIGEST, SIZE, tmp_path / "package", on_bytes=ignore, patience=0.3)


def test_a_site_that_was_revoked_is_told(world: World, tmp_path: Path) -> None:
    world.refuse = True
    with pytest.raises(Untrusted, match="revoked"):
        fetch(world.address(), DIGEST, SIZE, tmp_path / "package", on_bytes=ignore)


def test_another_server_is_not_talked_to(world: World, tmp_path: Path) -> None:
    """Another authority, and the right authority's certificate for another host."""
    other = create_authority("authority", now=NOW)
    for address in (world.address(ca=other.certificate), world.address(host="localhost")):
        with pytest.raises(Untrusted, match="pinned authority"):
            fetch(address, DIGEST, SIZE, tmp_path / "package", on_bytes=ignore, patience=2)


def test_without_a_certificate_of_the_authority_nothing_comes(world: World, tmp_path: Path) -> None:
    other, key = create_authority("authority", now=NOW), new_key()
    cert = issue_client(other, make_request(key, "ash"), "ash", now=NOW)
    with pytest.raises(DataError, match="certificate still good"):
        fetch(world.address(cert=cert, key=key), DIGEST, SIZE, tmp_path / "p", on_bytes=ignore, patience=0.3)


def test_a_package_that_is_not_there(world: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not_found: no such package"):
        fetch(world.address(), "0" * 64, SIZE, tmp_path / "package", on_bytes=ignore)


def test_a_file_changed_at_the_depot_is_refused(world: World, tmp_path: Path) -> None:
    for place in (0, SIZE // 2, SIZE - 1):
        changed = bytearray(CONTENT)
        changed[place] ^= 1
        (world.folder / DIGEST).write_bytes(changed)
        with pytest.raises(DigestMismatch, match="another file"):
            fetch(world.address(), DIGEST, SIZE, tmp_path / "package", on_bytes=ignore)
        assert list(tmp_path.glob("package*")) == []


@pytest.mark.parametrize("wrong", [b"\0" * 1000, CONTENT + b"\0", bytes(SIZE)], ids=["begun", "longer", "whole"])
def test_after_a_damaged_partial_the_file_is_fetched_from_its_first_byte(
    world: World, tmp_path: Path, wrong: bytes
) -> None:
    target, seen = tmp_path / "package", list[int]()
    partial(target).write_bytes(wrong)
    fetch(world.address(), DIGEST, SIZE, target, on_bytes=seen.append)
    assert target.read_bytes() == CONTENT
    assert seen.count(0) == 1


def test_it_begins_anew_once_and_no_more(world: World, tmp_path: Path) -> None:
    (world.folder / DIGEST).write_bytes(bytes(SIZE))
    seen: list[int] = []
    partial(tmp_path / "package").write_bytes(CONTENT[:1000])
    with pytest.raises(DigestMismatch, match="another file"):
        fetch(world.address(), DIGEST, SIZE, tmp_path / "package", on_bytes=seen.append)
    assert (seen.count(0), seen.count(SIZE)) == (1, 2)
    assert list(tmp_path.glob("package*")) == []


def test_a_depot_with_its_hands_full_is_waited_for(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another site has the one worker of the depot, and gives it back after a while."""
    monkeypatch.setattr(offsite.coordinator.network.depot, "MAX_REQUESTS", 1)
    small = Depot(world.folder, address="127.0.0.1:0", tls=world.tls, allowed=world.allowed)
    world.wire.to = port = small.start()
    credentials = grpc.ssl_channel_credentials(world.tls.ca, world.key, world.cert)
    # a window of a fixed size: otherwise gRPC reads ahead, and the depot is done although one chunk alone was taken
    window = [("grpc.http2.lookahead_bytes", 1 << 16), ("grpc.http2.bdp_probe", 0)]
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=window) as channel:
        held = stubs.DepotStub(channel).Get(wire.GetRequest(sha256=DIGEST))
        next(held)
        with pytest.raises(DataError, match="Concurrent RPC limit exceeded!; no byte came for"):
            fetch(world.address(), DIGEST, SIZE, tmp_path / "package", on_bytes=ignore, patience=0.3)
        threading.Timer(0.7, held.cancel).start()
        fetch(world.address(), DIGEST, SIZE, tmp_path / "package", on_bytes=ignore, patience=20)
    small.stop()


def test_a_name_that_is_taken_is_said_without_the_path(world: World, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    with pytest.raises(DataError, match="package=package: cannot be written") as caught:
        fetch(world.address(), DIGEST, SIZE, tmp_path / "package", on_bytes=ignore)
    assert str(tmp_path) not in str(caught.value)


def test_a_file_has_its_name_after_its_bytes_are_on_disk(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, synced = tmp_path / "package", list[tuple[int, bool]]()
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, target.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    fetch(world.address(), DIGEST, SIZE, target, on_bytes=ignore)
    assert (target.stat().st_ino, False) in synced
    assert synced[-1] == (tmp_path.stat().st_ino, True)


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 1, 0])
def test_another_size_than_announced_is_refused(world: World, tmp_path: Path, size: int) -> None:
    with pytest.raises(DigestMismatch):
        fetch(world.address(), DIGEST, size, tmp_path / "package", on_bytes=ignore)
    assert list(tmp_path.glob("package*")) == []


def test_a_full_disk_leaves_the_partial_whole(world: World, tmp_path: Path) -> None:
    target, limit = tmp_path / "package", 3 * CHUNK + 1234
    full = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    said = child(world, target, full).communicate(timeout=300)[0]
    assert said.startswith("DataError package=package.partial: cannot be written (File too large); free disk space")
    content = partial(target).read_bytes()
    assert 3 * CHUNK <= len(content) <= limit
    assert CONTENT.startswith(content)
    carried = world.wire.down
    assert child(world, target).communicate(timeout=300)[0] == "whole\n"
    assert target.read_bytes() == CONTENT
    assert world.wire.down - carried < SIZE - 2 * CHUNK


def test_a_key_does_not_show_in_a_representation(world: World) -> None:
    assert "PRIVATE" not in repr(world.address())
