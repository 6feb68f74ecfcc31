"""Strangers who hold all connections that they can get, against a coordinator with few open files."""

import contextlib
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from offsite.client.home.installation import SiteHome
from offsite.client.network.node import Node
from offsite.client.service.site_runtime import SiteRuntime
from offsite.protos.flower_pieces import OTHER_BYTES
from offsite.protos.flower_process import allow_open_files
from tests.faults.conftest import wait_for
from tests.faults.joined import DIGEST, PACKAGE, joined, now

FILES = 300  # of each program of the coordinator; stock Flower was shut with as many
STRANGERS = 330


class Crowd(threading.Thread):
    """Strangers at one port, who say nothing and come again whenever they are sent away.

    Args:
      port: port of the coordinator.
      ca: file of the coordinator's authority, by which the strangers finish TLS; None to stop before it.
    """

    def __init__(self, port: int, ca: Path | None) -> None:
        super().__init__(daemon=True)
        self._port, self._ended = port, threading.Event()
        self._context = ssl.create_default_context(cafile=str(ca)) if ca else None
        self.held: list[socket.socket] = []
        self.came = 0

    def run(self) -> None:
        while not self._ended.is_set():
            full = self.came >= STRANGERS
            self._ended.wait(0.2 if full else 0.0)
            gone = set(select.select(self.held, [], [], 0.02)[0]) if self.held else set()
            for stranger in gone:
                try:
                    if stranger.recv(4096):
                        continue
                except (BlockingIOError, ssl.SSLWantReadError):
                    continue  # those were the tickets of TLS
                except OSError:
                    pass
                self.held.remove(stranger)
                stranger.close()
            for _ in range(min(2 if full else 20, STRANGERS - len(self.held))):  # each costs the test two handshakes
                with contextlib.suppress(OSError):
                    self.held.append(self._come())
                    self.came += 1

    def leave(self) -> None:
        self._ended.set()
        self.join()
        for stranger in self.held:
            stranger.close()

    def _come(self) -> socket.socket:
        plain = socket.create_connection(("127.0.0.1", self._port), timeout=5)
        try:
            stranger = self._context.wrap_socket(plain, server_hostname="127.0.0.1") if self._context else plain
            stranger.setblocking(False)
            return stranger
        except OSError:
            plain.close()
            raise


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", SiteHome, list[int]]]:
    home, (site, *_) = joined(tmp_path)
    command = [sys.executable, "-m", "tests.faults.crowded", str(home.folder), str(FILES)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    yield process, site, [home.settings.link_port, home.settings.depot_port]
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


def test_strangers_who_hold_on_keep_no_site_out(
    coordinator: tuple["subprocess.Popen[str]", SiteHome, list[int]], tmp_path: Path
) -> None:
    """The site comes from the strangers' own address, after them, and comes again; half of them have finished TLS."""
    allow_open_files(4096)
    process, site, (link, depot) = coordinator
    assert process.stdin is not None
    assert process.stdout is not None
    crowds = [Crowd(link, site.ca), Crowd(link, None), Crowd(depot, None)]
    for crowd in crowds:
        crowd.start()
    runtime, stopping = SiteRuntime.of(site, now), threading.Event()
    node = Node(
        runtime.supernode(),
        lambda stage, body: body[::-1],
        largest=lambda: OTHER_BYTES,
        note=runtime.note,
        stopping=stopping.is_set,
    )
    thread = threading.Thread(target=node.run)
    try:
        wait_for(lambda: all(crowd.came > FILES for crowd in crowds), 60)
        thread.start()
        wait_for(lambda: ask(process, "question") == "noitseuq", 60)
        package = runtime.fetch(DIGEST, len(PACKAGE), tmp_path / "package", lambda count: None)
        assert package.read_bytes() == PACKAGE
        began = {crowd: crowd.came for crowd in crowds}
        wait_for(lambda: all(crowd.came > began[crowd] + 20 for crowd in crowds), 60)
        assert ask(process, "again") == "niaga"
    finally:
        stopping.set()
        for crowd in crowds:
            crowd.leave()
        if thread.is_alive():
            thread.join()


def ask(process: "subprocess.Popen[str]", question: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{question}\n")
    process.stdin.flush()
    time.sleep(0.1)
    return process.stdout.readline().strip()
