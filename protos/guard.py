"""A lock in front of Flower's HTTP programs: without this machine's secret, only the paths that peers need answer.

On the port that data owners reach, stock Flower 1.41 also serves the interface that starts runs and hands out tasks,
and asks a peer for no more than the CA certificate: such a peer can run code on every node. It also reads a whole
request before it checks the sender, and writes a stranger's content type into its log.
"""

import asyncio
import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from offsite.errors import ConfigError

HEADER = "x-offsite-secret"
VARIABLE = "OFFSITE_GUARD"  # names the secret's file; the secret itself would show in a process list
# The longest request that carries no content lists the pieces of a message, 68 bytes for each. Flower writes each name
# into its database under one lock, so that a list of 8 MiB would stop it for minutes.
MAX_BODY_BYTES, LISTED_BYTES = 128 << 10, 100
# The largest body that an honest SuperNode sends is one piece of an array: 1 MiB by `protos.flower_process.QUIET`, and
# 5 MiB by Flower's default.
MAX_OBJECT_BYTES = 8 << 20
# Of all peers at once; a site uploads two pieces of 1 MiB at a time, and sends a piece again after a 503
# (`_RETRYABLE_STATUS_CODES` in flwr/supercore/retry/http_retry.py).
MAX_HELD_BYTES = 256 << 20
READ_SECONDS = 60.0  # an upload that moved no piece for so long counts as dead: `coordinator.network.superlink`
CONTENT = b"application/protobuf"  # content type of every request of Flower's client: `PROTOBUF_MEDIA_TYPE`
Peer = tuple[str, int]  # address and port
_Message = MutableMapping[str, Any]
_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


@dataclass(frozen=True)
class RequestLimits:
    """What peers without the secret may send.

    Attributes:
      body: most bytes of one body.
      longer: most bytes of one body by path, for the paths that allow more than `body`.
      held: most bytes of all peers' bodies that are read or worked on at once.
      seconds: time within which a whole body must have arrived.
    """

    body: int = MAX_BODY_BYTES
    longer: Mapping[str, int] = field(default_factory=dict)
    held: int = MAX_HELD_BYTES
    seconds: float = READ_SECONDS

    def of(self, path: str) -> int:
        """Returns the most bytes that a body on this path may have."""
        return self.longer.get(path, self.body)


class Guard:
    """ASGI middleware: without the secret, 404 for paths that are not public, and errors for what no honest peer sends.

    Args:
      app: the guarded application.
      secret: secret of this machine; compared in constant time.
      public: paths that peers may reach; a path that ends with a slash stands for all paths below it.
      limits: limits of what peers send to public paths.
      note: function that gets a peer with each of its requests, and whether the peer has shown who it is: by the
        secret, or by a request that the application has answered with success.
    """

    def __init__(
        self,
        app: Callable[[_Scope, _Receive, _Send], Awaitable[None]],
        secret: str,
        public: tuple[str, ...],
        limits: RequestLimits | None = None,
        note: Callable[[Peer, bool], None] = lambda peer, known: None,
    ):
        self._note = note
        self._app, self._secret, self._public = app, secret.encode(), public
        self._limits = limits or RequestLimits()
        self._room = _Room(self._limits.held)

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Passes a request on, or ends it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        ours = self._is_ours(scope)
        self._note_peer(scope, known=ours)
        if ours:
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif not self._is_public(scope["path"]):
            await _end(send, HTTPStatus.NOT_FOUND)
        elif scope["method"] == "POST" and _values(scope, "content-type") != [CONTENT]:
            await _end(send, HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        elif _announced(scope) > self._limits.of(scope["path"]):
            await _end(send, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Reads a body and hands it to the application; its memory counts as held until the application answered."""
        with self._room.share() as share:
            first = await self._first(scope, receive, share)
            if isinstance(first, HTTPStatus):
                await _end(send, first)
            else:
                await self._app(scope, _after(first, receive), self._noting(scope, send))

    def _note_peer(self, scope: _Scope, *, known: bool) -> None:
        if scope.get("client"):
            host, port, *_ = scope["client"]
            self._note((host, port), known)

    def _noting(self, scope: _Scope, send: _Send) -> _Send:
        """Returns a sender that notes a peer whose POST succeeds; Flower answers no other peer's with success."""

        async def noting(message: _Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == HTTPStatus.OK:
                self._note_peer(scope, known=scope["method"] == "POST")
            await send(message)

        return noting

    async def _first(self, scope: _Scope, receive: _Receive, share: "_Share") -> _Message | HTTPStatus:
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await _read(receive, self._limits.of(scope["path"]), share)
        except TimeoutError:
            return HTTPStatus.REQUEST_TIMEOUT

    def _is_public(self, path: str) -> bool:
        return any(path.startswith(known) if known.endswith("/") else path == known for known in self._public)

    def _is_ours(self, scope: _Scope) -> bool:
        given = _values(scope, HEADER)
        return len(given) == 1 and hmac.compare_digest(given[0], self._secret)


class _Room:
    """The memory that all peers' bodies share; a body that is only announced takes none."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    @contextmanager
    def share(self) -> Iterator["_Share"]:
        """Gives one request its share, and takes it back at the end."""
        share = _Share(self)
        try:
            yield share
        finally:
            self.held -= share.held


class _Share:
    def __init__(self, room: _Room) -> None:
        self._room, self.held = room, 0

    def take(self, count: int) -> bool:
        """Takes memory; returns whether there was room for it."""
        self.held += count
        self._room.held += count
        return self._room.held <= self._room.limit


def _values(scope: _Scope, header: str) -> list[bytes]:
    return [value for name, value in scope["headers"] if name == header.encode()]


def _announced(scope: _Scope) -> int:
    """Returns the bytes that a request announces, 0 without an announcement; arriving bytes are counted anyway."""
    # twenty digits are beyond any limit, and Python refuses to read thousands
    return max((int(value[:20]) for value in _values(scope, "content-length") if value.isdigit()), default=0)


async def _read(receive: _Receive, limit: int, share: _Share) -> _Message | HTTPStatus:
    """Returns the whole body as one message, or the peer's disconnect; a status if it is too long or has no room."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return message
        piece = message.get("body", b"")
        if len(body) + len(piece) > limit:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        if not share.take(len(piece)):
            return HTTPStatus.SERVICE_UNAVAILABLE
        body += piece
        if not message.get("more_body", False):
            return {"type": "http.request", "body": bytes(body), "more_body": False}


def _after(first: _Message, receive: _Receive) -> _Receive:
    """Returns the receiver of an application whose first message was taken out already."""
    waiting = [first]

    async def next_message() -> _Message:
        return waiting.pop() if waiting else await receive()

    return next_message


async def _end(send: _Send, status: HTTPStatus) -> None:
    # the connection is closed, or the rest of a refused body would still be read
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": b""})


class Secret:
    """Adds this machine's secret to the requests of a Flower client, so that our guard lets them through.

    Args:
      secret: secret of this machine.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        """Passes a request on, with the secret."""
        context.request.headers[HEADER] = self._secret
        return call_next(context)


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
    """Returns the secret from the file that the parent process named.

    Raises:
      ConfigError: no file is named.
    """
    if not (path := os.environ.get(VARIABLE)):
        raise ConfigError(f"{VARIABLE}: not set; this program is started by `offsite coordinator run` or `client run`")
    return Path(path).read_text(encoding="ascii")
