"""A relay before a server that cannot count its own connections: bytes pass both ways, TLS stays between the ends."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, cast

from offsite.coordinator.network.admission import Admission, Connection, ConnectionLimits
from offsite.coordinator.network.front_door import Accepted, FrontDoor, open_doors

FILES = 3  # open files of one connection in this process: both ends of the relay, and the server's end
ASKED_PIECE, SAID_PIECE = 1 << 14, 1 << 16  # bytes read at once from a peer, and from the server
# More bytes than any server says before it has the peer's certificate: its own certificates and tickets.
SPOKEN_BYTES = 1 << 16
STOP_SECONDS = 5.0
PAUSE_SECONDS = 0.05


class Relay:
    """Listens on a public address, and passes connections on to a local server that asks peers for a certificate.

    A peer counts as known once the server has said more than a handshake to it, or has kept it for longer than a
    handshake may take.

    Args:
      server: path of the local server's socket.
      handshake: seconds after which the local server cuts a connection without a certificate.
    """

    def __init__(self, server: Path, handshake: float) -> None:
        self._server, self._handshake = server, handshake
        self._thread = threading.Thread(target=self._run, name="depot relay", daemon=True)
        self._doors: list[FrontDoor] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, host: str, port: int) -> int:
        """Begins to listen and returns the port.

        Raises:
          OSError: the host has no address, or the port is taken.
        """
        limits = ConnectionLimits.of_this_process(FILES)
        self._admission, self._most = Admission(limits), limits.strangers + limits.known
        self._doors = open_doors(host, port, self._admission, self._settle_later)
        self._loop = asyncio.new_event_loop()
        self._thread.start()
        return int(self._doors[0].getsockname()[1])

    def stop(self) -> None:
        """Ends all connections."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        try:
            for door in self._doors:
                self._begin(self._accept(door))
            self._loop.run_forever()
            for task in self._tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        finally:
            for door in self._doors:
                door.close()
            self._loop.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _settle_later(self, connection: Connection) -> None:
        """Counts a connection as known that the server keeps for longer than a handshake."""
        self._loop.call_later(self._handshake + 1, self._admission.know, connection)

    async def _accept(self, door: FrontDoor) -> None:
        while True:
            while len(self._tasks) > self._most:  # those that were cut close first
                await asyncio.sleep(PAUSE_SECONDS / 10)
            try:
                accepted, _ = await self._loop.sock_accept(door)
            except OSError:  # the system is short of files for a moment
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            accepted.setblocking(False)
            self._begin(self._serve(cast(Accepted, accepted)))

    async def _serve(self, near: Accepted) -> None:
        """Passes bytes both ways until one end is gone; no client of gRPC closes its half of a connection alone."""
        with near:
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as far:
                    far.setblocking(False)
                    await self._reach(far)
                    async with asyncio.TaskGroup() as both:
                        both.create_task(self._pass(near, far, ASKED_PIECE))
                        both.create_task(self._pass(far, near, SAID_PIECE, near.connection))
            except* OSError:
                pass

    async def _reach(self, far: socket.socket) -> None:
        """Connects to the local server, whose queue may be full for a moment."""
        for _ in range(int(self._handshake / PAUSE_SECONDS)):
            with contextlib.suppress(BlockingIOError):
                return far.connect(str(self._server))
            await asyncio.sleep(PAUSE_SECONDS)
        raise TimeoutError

    async def _pass(
        self, source: socket.socket, sink: socket.socket, piece: int, spoken_to: Connection | None = None
    ) -> None:
        """Passes bytes on, and raises `ConnectionError` where the source ends, so that both ends are closed at once."""
        room, said = bytearray(piece), 0
        view = memoryview(room)
        while count := await self._loop.sock_recv_into(source, room):
            await self._loop.sock_sendall(sink, view[:count])
            said += count
            if spoken_to is not None and said > SPOKEN_BYTES:
                self._admission.know(spoken_to)
        raise ConnectionError
