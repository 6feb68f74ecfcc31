"""A lock in front of Flower's HTTP programs: without the secret of this machine, only the paths a peer needs answer.

Stock Flower 1.41 serves the interface that starts runs and hands out tasks on the port that data owners reach, and asks
nobody who holds the CA certificate for more: such a peer can run code on every node. It also reads a request whole
before it asks who sent it.
"""

import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from errors import ConfigError

HEADER = "x-offsite-secret"
VARIABLE = "OFFSITE_GUARD"  # names the file that holds the secret; a secret itself would show in a process list
# The largest body that an honest SuperNode sends is one piece of an array: 1 MiB by `protos.flower_process.QUIET`, and
# 5 MiB by Flower's default. A longer message only has more pieces: their names, listed once, are 70 kB for 1 GiB.
MOST_BODY_BYTES = 8 << 20
_Message = MutableMapping[str, Any]
_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class Guard:
    """ASGI middleware: without the secret, 404 for what is not public, and 413 for a body that no honest peer sends.

    Args:
      app: the guarded application.
      secret: of this machine; compared in constant time.
      public: paths that peers may reach; one that ends with a slash stands for all below it.
      most: bytes of one body that a peer may send.
    """

    def __init__(
        self,
        app: Callable[[_Scope, _Receive, _Send], Awaitable[None]],
        secret: str,
        public: tuple[str, ...],
        most: int = MOST_BODY_BYTES,
    ):
        self._app, self._secret, self._public, self._most = app, secret.encode(), public, most

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Passes a request on, or ends it."""
        if scope["type"] == "lifespan" or self._is_ours(scope):
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif not self._is_public(scope["path"]):
            await _end(send, 404)
        elif _announced(scope) > self._most or (whole := await _read(receive, self._most)) is None:
            await _end(send, 413)
        else:
            await self._app(scope, _after(whole, receive), send)

    def _is_public(self, path: str) -> bool:
        return any(path.startswith(one) if one.endswith("/") else path == one for one in self._public)

    def _is_ours(self, scope: _Scope) -> bool:
        given = _values(scope, HEADER)
        return len(given) == 1 and hmac.compare_digest(given[0], self._secret)


def _values(scope: _Scope, header: str) -> list[bytes]:
    return [value for name, value in scope["headers"] if name == header.encode()]


def _announced(scope: _Scope) -> int:
    """Returns the bytes that a request announces, 0 where it does not say; what comes is counted all the same."""
    # twenty digits are beyond any limit, and Python refuses to read thousands
    return max((int(value[:20]) for value in _values(scope, "content-length") if value.isdigit()), default=0)


async def _read(receive: _Receive, most: int) -> _Message | None:
    """Returns the whole body as one message, or the peer's going away; None for a body beyond `most` bytes."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return message
        body += message.get("body", b"")
        if len(body) > most:
            return None
        if not message.get("more_body", False):
            return {"type": "http.request", "body": bytes(body), "more_body": False}


def _after(first: _Message, receive: _Receive) -> _Receive:
    """Returns what an application receives when a message was taken out already."""
    waiting = [first]

    async def next_message() -> _Message:
        return waiting.pop() if waiting else await receive()

    return next_message


async def _end(send: _Send, status: int) -> None:
    # closed, or the rest of a refused body would still be read
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def new_secret(path: Path) -> str:
    """Writes a fresh secret to a file that only this user can read, and returns it."""
    secret = secrets.token_hex(32)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret)
    return secret


def secret_of_environment() -> str:
    """Returns the secret whose file the parent process named.

    Raises:
      ConfigError: no file is named.
    """
    if not (path := os.environ.get(VARIABLE)):
        raise ConfigError(f"{VARIABLE}: not set; this program is started by `offsite coordinator run` or `client run`")
    return Path(path).read_text(encoding="ascii")
