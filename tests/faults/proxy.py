"""A TCP proxy on loopback that can be slow, and that can fall silent."""

import socket
import threading
import time

PIECE = 4096


class Proxy:
    """Forwards one port to another.

    Args:
      target: number of the target port on loopback.
      rate: bytes per second for each direction of each connection; None for no limit.
    """

    def __init__(self, target: int, *, rate: float | None = None) -> None:
        self._target, self._rate = target, rate
        self._silent = threading.Event()
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.moved = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def silence(self) -> None:
        """Lets nothing through any more; connections stay open, as over a cable that was pulled."""
        self._silent.set()

    def heal(self) -> None:
        """Lets everything through again."""
        self._silent.clear()

    def close(self) -> None:
        self._closed = True
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()  # nobody listens there yet
                continue
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while piece := source.recv(PIECE):
                while self._silent.is_set():
                    time.sleep(0.05)
                if self._rate is not None:
                    time.sleep(len(piece) / self._rate)
                sink.sendall(piece)
                self.moved += len(piece)
        except OSError:
            pass
        finally:
            for one in (source, sink):
                one.close()
