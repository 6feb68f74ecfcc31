"""Fetching a package from the depot: in chunks, from the end of an earlier try, and checked by its SHA-256."""

import hashlib
import random
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from offsite.errors import DataError, DigestMismatch, Untrusted
from offsite.protos import depot_pb2 as wire
from offsite.protos import depot_pb2_grpc as stubs
from offsite.protos.grpc_options import UNCOMPRESSED
from offsite.trust.addresses import with_port
from offsite.trust.files import put_in_place, why

CHUNK, MIN_CHUNK = 1 << 20, 1 << 14
MESSAGE_LIMIT = CHUNK + 4096
IDLE_SECONDS, PATIENCE_SECONDS = 60.0, 3600.0
BACKOFF_SECONDS = (0.5, 20.0)
# Codes that another try cannot change. By every other code gRPC reports a connection that broke or was not made.
_FINAL = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
# The coordinator reads the reason of a fetch that failed, and need not know the proxy's address.
THROUGH_PROXY = "the proxy that site.toml names does not lead there now"
_BUSY = "Concurrent RPC limit exceeded"  # gRPC's words for a depot with its hands full; a message too large has others
_STRANGER = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification")  # gRPC's words for a server that is not the pinned


@dataclass(frozen=True)
class DepotAddress:
    """The way to the depot.

    Attributes:
      host, port: address of the depot.
      ca: certificate of the authority, PEM bytes.
      cert, key: certificate and key of this site, PEM bytes.
      proxy: address of the proxy on the way; empty for the straight way.
    """

    host: str
    port: int
    ca: bytes
    cert: bytes
    key: bytes = field(repr=False)
    proxy: str = field(default="", repr=False)


def fetch(
    source: DepotAddress,
    sha256: str,
    size: int,
    target: Path,
    *,
    on_bytes: Callable[[int], None],
    idle: float = IDLE_SECONDS,
    patience: float = PATIENCE_SECONDS,
) -> Path:
    """Fetches a file, and returns its path once its hash is right; a try after a kill goes on at the last byte.

    A transfer is never given up while bytes move: on a link that is too slow for a chunk within `idle` seconds, chunks
    become smaller. `target` with the suffix `.partial` holds the fetched bytes. Where an earlier try left damaged
    bytes, the file is fetched once more from its first byte.

    Args:
      source: address of the depot, and this site's credentials.
      sha256: SHA-256 of the file, hexadecimal.
      size: announced size of the file, bytes; no further byte is accepted.
      target: path of the fetched file.
      on_bytes: function that gets the number of fetched bytes.
      idle: seconds without a chunk after which to connect again.
      patience: seconds without a byte after which to give up.

    Raises:
      DigestMismatch: the file is another, longer or shorter than announced; the fetched bytes are removed.
      Untrusted: the depot is not the pinned one, or does not let this site in.
      DataError: the disk is full, the depot has no such package, or does not answer for longer than the patience.
    """
    if target.is_file() and target.stat().st_size == size and _sha256(target) == sha256:
        on_bytes(size)
        return target
    transfer = _Transfer(source, sha256, size, _touch(target.with_name(target.name + ".partial")), on_bytes, idle)
    resumed = transfer.here() > 0
    _complete(transfer, patience)
    right = transfer.is_right()
    if resumed and not right:  # each chunk of this try was checked, so only the bytes of an earlier try can be wrong
        transfer.begin_anew()
        _complete(transfer, patience)
        right = transfer.is_right()
    if not right:
        transfer.refuse("another file was fetched, and was removed; fetch the package again")
    try:
        put_in_place(transfer.partial, target)
    except DataError as error:  # the coordinator reads this and need not know the site's folders
        raise DataError(f"package={target.name}: cannot be written ({why(error)}); free disk space") from error
    on_bytes(size)
    return target


def _complete(transfer: "_Transfer", patience: float) -> None:
    """Tries until all bytes are here.

    Raises:
      DataError: no byte came for `patience` seconds; also every error of `_Transfer.attempt`.
    """
    last, pause = time.monotonic(), BACKOFF_SECONDS[0]
    while (here := transfer.here()) < transfer.size:
        reason = transfer.attempt()
        if transfer.here() > here:
            last, pause = time.monotonic(), BACKOFF_SECONDS[0]
        elif time.monotonic() - last > patience:
            raise DataError(f"depot={transfer.where}: {reason}; no byte came for {patience:g} s; try later")
        if transfer.here() < transfer.size:
            time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - only spreads the sites' tries
            pause = min(2 * pause, BACKOFF_SECONDS[1])


class _Transfer:
    """One file on its way: each attempt goes on where the last attempt ended."""

    def __init__(
        self, source: DepotAddress, sha256: str, size: int, partial: Path, on_bytes: Callable[[int], None], idle: float
    ) -> None:
        self.partial, self.size, self.where = partial, size, with_port(source.host, source.port)
        self._source, self._sha256 = source, sha256
        self._on_bytes, self._idle, self._chunk = on_bytes, idle, CHUNK

    def here(self) -> int:
        """Returns the number of bytes on the disk."""
        return self.partial.stat().st_size

    def is_right(self) -> bool:
        """Says whether the bytes on the disk are the file."""
        return self.here() == self.size and _sha256(self.partial) == self._sha256

    def begin_anew(self) -> None:
        """Removes the fetched bytes."""
        self.partial.write_bytes(b"")
        self._on_bytes(0)

    def attempt(self) -> str:
        """Fetches until the end or until the connection fails, and returns the reason of the end."""
        source = self._source
        credentials = grpc.ssl_channel_credentials(source.ca, source.key, source.cert)
        try:
            with grpc.secure_channel(self.where, credentials, options=_options(source.proxy)) as channel:
                depot = stubs.DepotStub(channel)
                described = depot.Describe(wire.DescribeRequest(sha256=self._sha256), timeout=self._idle)
                if described.size != self.size:
                    self.refuse(f"the depot has {described.size} bytes, and {self.size} were announced; refused")
                return self._receive(depot)
        except grpc.RpcError as error:
            reason = _passing(error)
            return THROUGH_PROXY if source.proxy and error.code() == grpc.StatusCode.UNAVAILABLE else reason
        except OSError as error:
            raise DataError(
                f"package={self.partial.name}: cannot be written ({error.strerror}); free disk space, then fetch again"
            ) from error

    def refuse(self, reason: str) -> None:
        """Removes the fetched bytes and refuses the file.

        Raises:
          DigestMismatch: always.
        """
        self.partial.unlink()
        raise DigestMismatch(f"package={self._sha256[:12]}: {reason}")

    def _receive(self, depot: Any) -> str:
        with self.partial.open("ab") as file:
            offset = began = file.tell()
            stream = depot.Get(wire.GetRequest(sha256=self._sha256, offset=offset, chunk=self._chunk))
            with _Watch(stream.cancel, self._idle) as watch:
                try:
                    for chunk in stream:
                        watch.moved()
                        if not chunk.data or chunk.offset != offset or zlib.crc32(chunk.data) != chunk.crc32:
                            return "a chunk was damaged on the way"  # the next attempt asks for the chunk again
                        offset += len(chunk.data)
                        if offset > self.size:
                            self.refuse(f"the depot sends more than the announced {self.size} bytes; refused")
                        file.write(chunk.data)
                        file.flush()
                        self._on_bytes(offset)
                finally:
                    stream.cancel()
                    if watch.expired and offset == began:
                        self._chunk = max(self._chunk // 2, MIN_CHUNK)  # not even one chunk came in time
        if offset < self.size:
            self.refuse(f"the depot's file ends after {offset} of the announced {self.size} bytes; refused")
        return "ended"


class _Watch:
    """Calls `cancel` once nothing has moved for `idle` seconds; used as a context manager."""

    def __init__(self, cancel: Callable[[], object], idle: float) -> None:
        self.expired = False
        self._cancel, self._idle, self._ended = cancel, idle, False
        self._event = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fetch watch", daemon=True)

    def moved(self) -> None:
        """Starts the wait anew, because a chunk came."""
        self._event.set()

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._event.set()
        self._thread.join()

    def _run(self) -> None:
        while self._event.wait(self._idle):
            self._event.clear()  # before `_ended` is read, so that an end in between is not missed
            if self._ended:
                return
        self.expired = True
        self._cancel()


def _options(proxy: str) -> list[tuple[str, Any]]:
    """Returns the options of a channel: no proxy of the environment, bounded messages, and nothing is inflated."""
    return [
        ("grpc.max_receive_message_length", MESSAGE_LIMIT),
        *UNCOMPRESSED,
        ("grpc.enable_http_proxy", int(bool(proxy))),
        *([("grpc.http_proxy", proxy)] if proxy else []),
        # gRPC has a second way to a proxy, by address; an empty list of addresses keeps the environment's out
        ("grpc.address_http_proxy_enabled_addresses", ""),
    ]


def _passing(error: grpc.RpcError) -> str:
    """Returns the reason of an error that may pass.

    Raises:
      Untrusted: the depot is not the pinned one, or does not let this site in.
      DataError: the depot has no such package, or speaks another version.
    """
    code, detail = error.code(), str(error.details())
    if code == grpc.StatusCode.PERMISSION_DENIED:
        raise Untrusted(f"depot: {detail}") from error
    if any(sign in detail for sign in _STRANGER):
        raise Untrusted(
            "depot: the server does not show the pinned authority's certificate for this host; compare welcomes"
        )
    if code in _FINAL and _BUSY not in detail:
        raise DataError(f"depot: {code.name.lower()}: {detail}") from error
    if "Socket closed" in detail:
        return f"{detail} (is this site's certificate still good? see offsite client doctor)"
    return detail


def _touch(partial: Path) -> Path:
    try:
        partial.touch()
    except OSError as error:
        raise DataError(f"package={partial.name}: cannot be written ({error.strerror}); free disk space") from error
    return partial


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
