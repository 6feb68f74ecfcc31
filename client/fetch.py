"""Fetching a package from the depot: in chunks, from where an earlier try ended, and checked by its SHA-256."""

import hashlib
import os
import random
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from errors import DataError, DigestMismatch, Untrusted
from protos import depot_pb2 as wire
from protos import depot_pb2_grpc as stubs

MESSAGE_LIMIT = (1 << 20) + 4096
IDLE_SECONDS = 60.0
BACKOFF_SECONDS = (0.5, 20.0)
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


@dataclass(frozen=True)
class DepotAddress:
    """Where the depot is, and the PEM bytes with which this site shows who it is."""

    host: str
    port: int
    ca: bytes
    cert: bytes
    key: bytes = field(repr=False)


def fetch(
    source: DepotAddress,
    sha256: str,
    size: int,
    target: Path,
    *,
    on_bytes: Callable[[int], None],
    idle: float = IDLE_SECONDS,
    patience: float = 3600.0,
) -> Path:
    """Fetches a file, and returns its path once its hash is right; a try after a kill goes on at the last byte.

    A transfer is never given up while bytes move. `target` with the suffix `.partial` holds what is here.

    Args:
      source: the depot.
      sha256: of the file, hexadecimal.
      size: its bytes, as announced; not one more is accepted.
      target: where it goes.
      on_bytes: told how many bytes are here.
      idle: seconds without a byte after which to connect again.
      patience: seconds without a byte after which to give up.

    Raises:
      DigestMismatch: the file is another, or longer than announced; what was fetched is removed.
      Untrusted: the depot does not let this site in.
      DataError: no room on the disk, no such package, or the depot is gone for longer than the patience.
    """
    partial = target.with_name(target.name + ".partial")
    if target.is_file() and target.stat().st_size == size and _sha256(target) == sha256:
        on_bytes(size)
        return target
    last, pause, here = time.monotonic(), BACKOFF_SECONDS[0], _here(partial)
    while here < size:
        reason = _attempt(source, sha256, size, partial, on_bytes, idle)
        moved, here = _here(partial) > here, _here(partial)
        if moved:
            last, pause = time.monotonic(), BACKOFF_SECONDS[0]
        elif time.monotonic() - last > patience:
            raise DataError(f"depot={source.host}:{source.port}: {reason}; no byte came for {patience:g} s; try later")
        if here < size:
            time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - only spreads the sites' tries
            pause = min(2 * pause, BACKOFF_SECONDS[1])
    if here != size or _sha256(partial) != sha256:
        partial.unlink()
        raise DigestMismatch(f"package={sha256[:12]}: what was fetched is another file; it was removed; fetch it again")
    partial.rename(target)
    on_bytes(size)
    return target


def _attempt(
    source: DepotAddress, sha256: str, size: int, partial: Path, on_bytes: Callable[[int], None], idle: float
) -> str:
    """Fetches until the end or until the connection fails, and returns why it ended."""
    credentials = grpc.ssl_channel_credentials(source.ca, source.key, source.cert)
    options = [("grpc.max_receive_message_length", MESSAGE_LIMIT), ("grpc.keepalive_time_ms", int(idle * 1000))]
    options += [("grpc.keepalive_timeout_ms", int(idle * 1000)), ("grpc.enable_http_proxy", 0)]
    with grpc.secure_channel(f"{source.host}:{source.port}", credentials, options=options) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=idle)
            _receive(channel, sha256, size, partial, on_bytes)
        except grpc.FutureTimeoutError:
            return "no connection (is the port open, and the certificate still good?)"
        except grpc.RpcError as error:
            return _passing(error)
    return "ended"


def _receive(channel: grpc.Channel, sha256: str, size: int, partial: Path, on_bytes: Callable[[int], None]) -> None:
    offset = _here(partial)
    stream = stubs.DepotStub(channel).Get(wire.GetRequest(sha256=sha256, offset=offset))
    try:
        with partial.open("ab") as file:
            for chunk in stream:
                if chunk.offset != offset or zlib.crc32(chunk.data) != chunk.crc32:
                    return  # damaged on the way; asked for again from here
                offset += len(chunk.data)
                if offset > size:
                    _refuse_longer(partial, sha256, size)
                file.write(chunk.data)
                file.flush()
                on_bytes(offset)
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"package={partial.name}: cannot be written ({error.strerror}); free disk space") from error
    finally:
        stream.cancel()


def _refuse_longer(partial: Path, sha256: str, size: int) -> None:
    partial.unlink(missing_ok=True)
    raise DigestMismatch(f"package={sha256[:12]}: the depot sends more than the announced {size} bytes; refused")


def _passing(error: grpc.RpcError) -> str:
    """Returns the reason of an error that may pass.

    Raises:
      Untrusted: the depot does not let this site in.
      DataError: it has no such package.
    """
    code, detail = error.code(), str(error.details())
    if code == grpc.StatusCode.PERMISSION_DENIED:
        raise Untrusted(f"depot: {detail}") from error
    if code not in _PASSING:
        raise DataError(f"depot: {code.name.lower()}: {detail}") from error
    return detail


def _here(partial: Path) -> int:
    return partial.stat().st_size if partial.exists() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
