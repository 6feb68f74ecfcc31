"""The listening sockets that strangers reach: every connection is counted before a byte of it is read."""

import contextlib
import socket
from collections.abc import Callable
from typing import Any

from offsite.coordinator.network.admission import Admission, Connection, Peer

BACKLOG = 128
AT_ONCE = 16  # connections accepted in a row; those that made way for them are closed only after
DEAD_SECONDS = 120  # time for which a peer may acknowledge nothing: its cable was pulled, or it does not read


class FrontDoor(socket.socket):
    """A listening TCP socket that puts each connection before an `Admission`.

    Args:
      family: address family of the socket.
      admission: open connections of the listener.
      on_enter: function that gets each connection right after it was let in.
    """

    def __init__(self, family: int, admission: Admission, on_enter: Callable[[Connection], None]) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self._admission, self._on_enter, self._in_a_row = admission, on_enter, 0

    def accept(self) -> tuple[socket.socket, Any]:
        """Accepts a connection, as `socket.accept` does; after `AT_ONCE` in a row it says once that nobody waits."""
        self._in_a_row += 1
        if self._in_a_row > AT_ONCE:
            self._in_a_row = 0
            raise BlockingIOError
        try:
            plain, address = super().accept()
        except OSError:
            self._in_a_row = 0
            raise
        accepted = Accepted(self.family, plain.detach(), self._admission, (str(address[0]), int(address[1])))
        self._admission.enter(accepted.connection)
        self._on_enter(accepted.connection)
        return accepted, address


class Accepted(socket.socket):
    """An accepted connection, which leaves its admission when it is closed.

    Args:
      family: address family of the socket.
      descriptor: file descriptor of the connection.
      admission: open connections of the listener.
      peer: address and port of the other end.
    """

    def __init__(self, family: int, descriptor: int, admission: Admission, peer: Peer) -> None:
        super().__init__(family, socket.SOCK_STREAM, fileno=descriptor)
        self._admission, self.connection = admission, Connection(peer, self._cut)
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * DEAD_SECONDS)

    def close(self) -> None:
        """Closes the connection."""
        self._admission.leave(self.connection)
        super().close()

    def _cut(self) -> None:
        """Ends the connection; the loop that serves it then reads its end and closes it."""
        with contextlib.suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)


def open_doors(
    host: str, port: int, admission: Admission, on_enter: Callable[[Connection], None] = lambda connection: None
) -> list[FrontDoor]:
    """Returns a listening socket for each address of a host; port 0 takes a free one, the same for all.

    Raises:
      OSError: the host has no address, or the port is taken.
    """
    doors: list[FrontDoor] = []
    with contextlib.ExitStack() as undo:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in found:
            door = FrontDoor(family, admission, on_enter)
            undo.callback(door.close)
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                door.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            door.bind((address[0], doors[0].getsockname()[1] if doors else port, *address[2:]))
            door.listen(BACKLOG)
            door.setblocking(False)
            doors.append(door)
        undo.pop_all()
    return doors
