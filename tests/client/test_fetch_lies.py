"""Fetching from a depot that lies or sends damaged chunks: a file on the disk is right, or is removed."""

import hashlib
import random
import zlib
from collections.abc import Callable, Iterator
from concurrent import futures
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

import offsite.client.network.fetch
from offsite.client.network.fetch import DepotAddress, fetch
from offsite.coordinator.network.depot import CHUNK
from offsite.errors import DataError, DigestMismatch
from offsite.protos import depot_pb2 as wire
from offsite.protos import depot_pb2_grpc as stubs
from offsite.trust.certificates import create_authority, issue_client, issue_server, make_request, new_key

NOW = datetime.now(UTC)
SIZE = 8 * CHUNK + 777
CONTENT = random.Random(7).randbytes(SIZE)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def ignore(_: int) -> None:
    pass


class Liar(stubs.DepotServicer):
    """A depot that sends each chunk through a function of (number of the request, chunk) and announces the right size.

    `beyond`: bytes that the depot sends after the end.
    """

    def __init__(self, change: Callable[[int, wire.Chunk], wire.Chunk], beyond: int = 0) -> None:
        self.change, self.content = change, CONTENT + bytes(beyond)
        self.asked: list[int] = []
        self.compression: grpc.Compression | None = None

    def Describe(self, request: Any, context: Any) -> Any:
        return wire.Description(sha256=request.sha256, size=SIZE, chunk=CHUNK)

    def Get(self, request: Any, context: Any) -> Iterator[Any]:
        self.asked.append(request.offset)
        for at in range(request.offset, len(self.content), CHUNK):
            data = self.content[at : at + CHUNK]
            yield self.change(len(self.asked), wire.Chunk(offset=at, data=data, crc32=zlib.crc32(data)))


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Liar], DepotAddress]]:
    monkeypatch.setattr(offsite.client.network.fetch, "BACKOFF_SECONDS", (0.05, 0.4))
    ca, key, own = create_authority("authority", now=NOW), new_key(), new_key()
    certificate = issue_server(ca, key, ["127.0.0.1"], now=NOW)
    site = issue_client(ca, make_request(own, "ash"), "ash", now=NOW)
    servers: list[grpc.Server] = []

    def serve(liar: Liar) -> DepotAddress:
        server = grpc.server(futures.ThreadPoolExecutor(4), compression=liar.compression)
        servers.append(server)
        stubs.add_DepotServicer_to_server(liar, server)
        credentials = grpc.ssl_server_credentials([(key, certificate)], ca.certificate, True)
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        return DepotAddress("127.0.0.1", port, ca.certificate, site, own)

    yield serve
    for server in servers:
        server.stop(0).wait()


Serve = Callable[[Liar], DepotAddress]


def unchanged(_: int, chunk: wire.Chunk) -> wire.Chunk:
    return chunk


@pytest.mark.parametrize("beyond", [1, CHUNK, 30 * CHUNK])
def test_more_than_announced_is_refused_and_never_on_disk(lying: Serve, tmp_path: Path, beyond: int) -> None:
    seen: list[int] = []
    with pytest.raises(DigestMismatch, match="more than the announced"):
        fetch(lying(Liar(unchanged, beyond)), DIGEST, SIZE, tmp_path / "package", on_bytes=seen.append)
    assert max(seen) <= SIZE
    assert list(tmp_path.glob("package*")) == []


def test_less_than_announced_is_refused_at_once(lying: Serve, tmp_path: Path) -> None:
    liar = Liar(unchanged)
    liar.content = CONTENT[:-1]
    with pytest.raises(DigestMismatch, match="file ends after"):
        fetch(lying(liar), DIGEST, SIZE, tmp_path / "package", on_bytes=ignore)
    assert liar.asked == [0]
    assert list(tmp_path.glob("package*")) == []


def damaged(field: str, value: Callable[[wire.Chunk], Any], times: int) -> Liar:
    def change(request: int, chunk: wire.Chunk) -> wire.Chunk:
        if request <= times and chunk.offset == 3 * CHUNK:
            setattr(chunk, field, value(chunk))
        return chunk

    return Liar(change)


DAMAGE: dict[str, tuple[str, Callable[[wire.Chunk], Any]]] = {
    "flipped bit": ("data", lambda c: bytes([c.data[0] ^ 128]) + c.data[1:]),
    "crc": ("crc32", lambda c: c.crc32 ^ 1),
    "cut": ("data", lambda c: c.data[:-1]),
    "place": ("offset", lambda c: c.offset + 1),
    "empty": ("data", lambda c: b""),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_chunk_is_asked_for_again_from_its_place(lying: Serve, tmp_path: Path, kind: str) -> None:
    liar = damaged(*DAMAGE[kind], times=2)
    target = fetch(lying(liar), DIGEST, SIZE, tmp_path / "package", on_bytes=ignore)
    assert liar.asked == [0, 3 * CHUNK, 3 * CHUNK]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("kind", DAMAGE)
def test_one_that_always_damages_is_given_up(lying: Serve, tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match="damaged on the way; no byte came for"):
        fetch(lying(damaged(*DAMAGE[kind], times=10**9)), DIGEST, SIZE, tmp_path / "p", on_bytes=ignore, patience=0.5)
    assert (tmp_path / "p.partial").read_bytes() == CONTENT[: 3 * CHUNK]


def test_a_message_larger_than_a_chunk_is_refused(lying: Serve, tmp_path: Path) -> None:
    liar = Liar(lambda _, chunk: wire.Chunk(offset=chunk.offset, data=bytes(2 * CHUNK), crc32=0))
    with pytest.raises(DataError, match="resource_exhausted"):
        fetch(lying(liar), DIGEST, SIZE, tmp_path / "package", on_bytes=ignore)


@pytest.mark.parametrize("kind", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_a_compressed_chunk_is_not_inflated(lying: Serve, tmp_path: Path, kind: grpc.Compression) -> None:
    """gRPC inflates what the other side compressed, whether or not it was asked to; here the bytes come as they are."""
    liar = Liar(lambda _, chunk: wire.Chunk(offset=chunk.offset, data=bytes(CHUNK), crc32=zlib.crc32(bytes(CHUNK))))
    liar.compression = kind
    with pytest.raises(DataError, match=r"is disabled|deserializing"):
        fetch(lying(liar), DIGEST, SIZE, tmp_path / "package", on_bytes=ignore, patience=0.3)
    assert (tmp_path / "package.partial").stat().st_size == 0
