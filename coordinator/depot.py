"""The depot: hands encrypted packages to the sites of the federation, in chunks, from any offset."""

import re
import zlib
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from errors import DataError, Untrusted
from protos import depot_pb2 as wire
from protos import depot_pb2_grpc as stubs

CHUNK = 1 << 20
WORKERS = 16
MESSAGE_LIMIT = CHUNK + 4096
STOP_SECONDS = 1.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Tls:
    """PEM bytes of the authority, of the server's certificate and of its key."""

    ca: bytes
    certificate: bytes
    key: bytes


class Depot:
    """A gRPC service over a folder whose files are named by their SHA-256; mutual TLS is not optional.

    Args:
      folder: with the files.
      address: host:port to listen on; port 0 takes a free one.
      tls: of the coordinator.
      allowed: given the peer's certificate (PEM) with every request; raises `Untrusted` for one that may not have it.
    """

    def __init__(self, folder: Path, *, address: str, tls: Tls, allowed: Callable[[bytes], None]) -> None:
        self._address = address
        options = [("grpc.max_receive_message_length", 4096), ("grpc.max_send_message_length", MESSAGE_LIMIT)]
        options += [("grpc.so_reuseport", 0)]
        self._server = grpc.server(futures.ThreadPoolExecutor(WORKERS), options=options)
        stubs.add_DepotServicer_to_server(_Servicer(folder, allowed), self._server)
        self._credentials = grpc.ssl_server_credentials([(tls.key, tls.certificate)], tls.ca, require_client_auth=True)

    def start(self) -> int:
        """Begins to serve and returns the port.

        Raises:
          DataError: the address is in use.
        """
        try:
            port = self._server.add_secure_port(self._address, self._credentials)
        except RuntimeError as error:
            raise DataError(f"depot={self._address}: cannot listen there; is the port in use?") from error
        self._server.start()
        return int(port)

    def stop(self) -> None:
        """Ends the service; a transfer that is cut off goes on later from where it was."""
        self._server.stop(STOP_SECONDS).wait()


class _Servicer(stubs.DepotServicer):
    def __init__(self, folder: Path, allowed: Callable[[bytes], None]) -> None:
        self._folder, self._allowed = folder, allowed

    def Describe(self, request: Any, context: Any) -> Any:  # noqa: N802 - named by the service
        path = self._path(request.sha256, context)
        return wire.Description(sha256=request.sha256, size=path.stat().st_size, chunk=CHUNK)

    def Get(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802 - named by the service
        path = self._path(request.sha256, context)
        if request.offset > path.stat().st_size:
            context.abort(grpc.StatusCode.OUT_OF_RANGE, f"offset={request.offset}: beyond the end of the file")
        with path.open("rb") as file:
            file.seek(request.offset)
            offset = request.offset
            while data := file.read(CHUNK):
                yield wire.Chunk(offset=offset, data=data, crc32=zlib.crc32(data))
                offset += len(data)

    def _path(self, digest: str, context: Any) -> Path:
        """Returns the file of a permitted request; the name is only ever 64 hexadecimal digits."""
        peer = context.auth_context().get("x509_pem_cert", [b""])[0]
        try:
            self._allowed(peer)
        except (Untrusted, DataError) as error:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        path = self._folder / digest
        if not _DIGEST.fullmatch(digest) or not path.is_file():
            context.abort(grpc.StatusCode.NOT_FOUND, "no such package; ask for the current offer")
        return path
