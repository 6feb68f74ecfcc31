"""Proxies on loopback: one that can be slow and fall silent, and one that writes down whatever reaches it."""

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


class RecordingProxy:
    """An HTTP proxy that keeps the first bytes of every connection, and opens a tunnel where `CONNECT` asks for it."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.address = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """Returns the variables by which programs and libraries are told a proxy, in both cases."""
        names = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "ftp_proxy")
        told = dict.fromkeys([*names, *(name.upper() for name in names)], self.address)
        by_address = {
            "GRPC_ADDRESS_HTTP_PROXY": f"127.0.0.1:{self.port}",
            "GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES": "127.0.0.0/8",
        }
        return told | by_address | dict.fromkeys(("no_proxy", "NO_PROXY", "no_grpc_proxy"), "other.example")

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head and (piece := near.recv(PIECE)):
            head += piece
        self.heads.append(head)
        if not head.startswith(b"CONNECT "):
            near.sendall(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n")
            near.close()
            return
        host, _, port = head.split()[1].decode().rpartition(":")
        far = socket.create_connection((host, int(port)))
        near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while piece := source.recv(PIECE):
                sink.sendall(piece)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()
