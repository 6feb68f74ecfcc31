"""The depot: hands encrypted packages to the sites of the federation, in chunks, from any offset."""

import logging
import re
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from offsite.coordinator.network.relay import Relay
from offsite.errors import DataError, OffsiteError, Untrusted
from offsite.protos import depot_pb2 as wire
from offsite.protos.flower_process import allow_open_files
from offsite.protos.grpc_options import UNCOMPRESSED

log = logging.getLogger("offsite.coordinator")
CHUNK, MIN_CHUNK = 1 << 20, 1 << 10
SERVICE = "offsite.depot.v1.Depot"
WORKERS = 64  # each site that is fetching holds one worker
MAX_REQUESTS = 4 * WORKERS  # at work or waiting for a worker; a site whose request is beyond the limit tries again
# Requests of one site: it fetches one file at a time, and requests of a broken connection end a little later.
MAX_OF_ONE = 8
BUSY = "Concurrent RPC limit exceeded"  # gRPC's own words at `MAX_REQUESTS`; a site that reads these words tries again
REQUEST_SECONDS = 10  # time within which a peer sends its request after opening it
HANDSHAKE_SECONDS = 10  # gRPC would keep a stranger's half-open connection for two minutes
IDLE_SECONDS = 120  # time for which a site's connection without a request is kept
REQUEST_LIMIT = 4096
STOP_SECONDS = 1.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Tls:
    """The depot's TLS credentials, PEM bytes.

    Attributes:
      ca: certificate of the authority.
      certificate: certificate of the server.
      key: private key of the server.
    """

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)


class Depot:
    """A gRPC service over a folder whose files are named by their SHA-256; mutual TLS is not optional.

    gRPC takes connections of strangers without an end until no file is left, so a relay before it counts them.

    Args:
      folder: folder with the encrypted packages.
      address: host:port to listen on; port 0 takes a free port.
      tls: the coordinator's credentials.
      allowed: called with the peer's certificate (PEM) on every request; raises `Untrusted` to refuse the peer.
    """

    def __init__(self, folder: Path, *, address: str, tls: Tls, allowed: Callable[[bytes], None]) -> None:
        self._address = address
        self._room = tempfile.TemporaryDirectory(prefix="offsite-depot-")  # only this user can enter it
        self._socket = Path(self._room.name) / "grpc"
        self._relay = Relay(self._socket, HANDSHAKE_SECONDS)
        options = [
            ("grpc.max_receive_message_length", REQUEST_LIMIT),
            *UNCOMPRESSED,
            ("grpc.so_reuseport", 0),
            ("grpc.server_handshake_timeout_ms", 1000 * HANDSHAKE_SECONDS),
            ("grpc.max_connection_idle_ms", 1000 * IDLE_SECONDS),
        ]
        workers = futures.ThreadPoolExecutor(WORKERS, "depot")
        self._server = grpc.server(workers, options=options, maximum_concurrent_rpcs=MAX_REQUESTS)
        self._server.add_generic_rpc_handlers((_handlers(_Servicer(folder, allowed)),))
        self._credentials = grpc.ssl_server_credentials([(tls.key, tls.certificate)], tls.ca, require_client_auth=True)

    def start(self) -> int:
        """Begins to serve and returns the port.

        Raises:
          DataError: the address is in use.
        """
        allow_open_files()
        self._server.add_secure_port(f"unix:{self._socket}", self._credentials)
        self._server.start()
        host, _, port = self._address.rpartition(":")
        try:
            return self._relay.start(host.strip("[]"), int(port))
        except OSError as error:
            self.stop()
            raise DataError(f"depot={self._address}: cannot listen there; is the port in use?") from error

    def stop(self) -> None:
        """Ends the service; a transfer that is cut off goes on later from where it was."""
        self._relay.stop()
        self._server.stop(STOP_SECONDS).wait()
        self._room.cleanup()


def _handlers(servicer: "_Servicer") -> grpc.GenericRpcHandler:
    """Returns the service of `protos/depot.proto`, whose single request our code takes from the stream.

    gRPC's own way waits for the request in a worker, without a time limit, before the peer is checked: a revoked site
    could hold all workers.
    """
    describe = grpc.stream_unary_rpc_method_handler(
        servicer.describe, wire.DescribeRequest.FromString, wire.Description.SerializeToString
    )
    get = grpc.stream_stream_rpc_method_handler(servicer.get, wire.GetRequest.FromString, wire.Chunk.SerializeToString)
    return grpc.method_handlers_generic_handler(SERVICE, {"Describe": describe, "Get": get})


class _Servicer:
    def __init__(self, folder: Path, allowed: Callable[[bytes], None]) -> None:
        self._folder, self._allowed = folder, allowed
        self._streams: dict[tuple[bytes, str], Any] = {}
        self._open: Counter[bytes] = Counter()
        self._lock = threading.Lock()

    def describe(self, requests: Iterator[Any], context: Any) -> Any:
        request, path, _ = self._admit(requests, context)
        return wire.Description(sha256=request.sha256, size=path.stat().st_size, chunk=CHUNK)

    def get(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        request, path, peer = self._admit(requests, context)
        if request.offset > path.stat().st_size:
            context.abort(grpc.StatusCode.OUT_OF_RANGE, f"offset={request.offset}: beyond the end of the file")
        self._replace((peer, request.sha256), context)
        with path.open("rb") as file:
            file.seek(request.offset)
            offset = request.offset
            while data := file.read(_chunk(request.chunk)):
                yield wire.Chunk(offset=offset, data=data, crc32=zlib.crc32(data))
                offset += len(data)

    def _admit(self, requests: Iterator[Any], context: Any) -> tuple[Any, Path, bytes]:
        """Returns a permitted request, its file, and the peer; a file name is only ever 64 hexadecimal digits."""
        peer = context.auth_context().get("x509_pem_cert", [b""])[0]
        try:
            self._allowed(peer)
        except Untrusted as error:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        except OffsiteError:
            log.exception("depot: its sites cannot be looked up")  # the peer must not learn about our files
            context.abort(grpc.StatusCode.UNAVAILABLE, "the depot cannot look up its sites; its log says why")
        self._count(peer, context)
        request = _first_request(requests, context)
        digest = request.sha256
        if not _DIGEST.fullmatch(digest) or not (path := self._folder / digest).is_file():
            context.abort(grpc.StatusCode.NOT_FOUND, "no such package; ask for the current offer")
        return request, path, peer

    def _count(self, peer: bytes, context: Any) -> None:
        """Counts a peer's request until it is over, or refuses it: one site must not hold what all sites share."""
        with self._lock:
            full = self._open[peer] >= MAX_OF_ONE
            self._open[peer] += not full
        if full:
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{BUSY}: a site may have {MAX_OF_ONE} requests; end others first"
            )
        if not context.add_callback(lambda: self._discount(peer)):
            self._discount(peer)  # the request is over already

    def _discount(self, peer: bytes) -> None:
        with self._lock:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]

    def _replace(self, key: tuple[bytes, str], context: Any) -> None:
        """Ends this peer's older transfer of the same file, which after a partition would hold its thread for ever."""
        with self._lock:
            older = self._streams.get(key)
            self._streams[key] = context
        if older is not None:
            older.cancel()
        if not context.add_callback(lambda: self._forget(key, context)):
            self._forget(key, context)  # the request is over already

    def _forget(self, key: tuple[bytes, str], context: Any) -> None:
        with self._lock:
            if self._streams.get(key) is context:
                del self._streams[key]


def _first_request(requests: Iterator[Any], context: Any) -> Any:
    """Returns the request of a peer, which has `REQUEST_SECONDS` to send it."""
    watch = threading.Timer(REQUEST_SECONDS, context.cancel)
    watch.start()
    try:
        return next(requests)
    except StopIteration:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no request came")
    finally:
        watch.cancel()


def _chunk(wanted: int) -> int:
    """Returns the bytes of one chunk: as the peer asks, at most `CHUNK`, but more than headers would outweigh."""
    return min(max(wanted, MIN_CHUNK), CHUNK) if wanted else CHUNK
