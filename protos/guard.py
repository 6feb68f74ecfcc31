"""A lock in front of Flower's HTTP programs: without the secret of this machine, only the paths a peer needs answer.

Stock Flower 1.41 serves the interface that starts runs and hands out tasks on the port that data owners reach, and asks
nobody who holds the CA certificate for more: such a peer can run code on every node.
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
_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guard:
    """ASGI middleware that answers 404 to every path that is not public, unless the request carries the secret.

    Args:
      app: the guarded application.
      secret: of this machine; compared in constant time.
      public: paths that peers may reach; one that ends with a slash stands for all below it.
    """

    def __init__(self, app: Callable[[_Scope, _Receive, _Send], Awaitable[None]], secret: str, public: tuple[str, ...]):
        self._app, self._secret, self._public = app, secret.encode(), public

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Passes a request on, or ends it."""
        if scope["type"] == "lifespan" or self._permits(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _permits(self, scope: _Scope) -> bool:
        path = scope["path"]
        if any(path.startswith(one) if one.endswith("/") else path == one for one in self._public):
            return True
        given = [value for name, value in scope["headers"] if name == HEADER.encode()]
        return len(given) == 1 and hmac.compare_digest(given[0], self._secret)


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
