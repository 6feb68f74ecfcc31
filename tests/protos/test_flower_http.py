"""Flower's HTTP clients against a server that lies: no proxy, no redirect, nothing inflated, nothing without end."""

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse
from flwr.supercore.runtime import RuntimeHttpClient

from offsite.errors import ConfigError
from offsite.protos.flower_http import MAX_ANSWER_BYTES, RuntimeClient
from offsite.protos.flower_process import FlowerProcess
from offsite.protos.proxies import check_proxy, names_proxy, proxy_variables, shown_proxy, without_proxies
from tests.faults.conftest import wait_for
from tests.faults.proxy import RecordingProxy

SWOLLEN = 32 << 20


class Liar(BaseHTTPRequestHandler):
    """Answers each path in a way that an honest server does not; keeps the paths that were asked for."""

    protocol_version = "HTTP/1.1"
    asked: list[str] = []  # noqa: RUF012 - of the class, since each request makes an instance

    def do_POST(self) -> None:
        kind = self.path.split("/")[1]
        self.asked.append(self.path)
        self.rfile.read(int(self.headers["content-length"]))
        body = AcquireTaskResponse(token="honest").SerializeToString()
        headers: dict[str, str] = {}
        if kind == "gzip":
            body, headers = gzip.compress(bytes(SWOLLEN)), {"content-encoding": "gzip"}
        elif kind == "twice":
            body, headers = gzip.compress(gzip.compress(bytes(SWOLLEN))), {"content-encoding": "gzip, gzip"}
        elif kind == "redirect":
            body, headers = b"", {"location": f"http://127.0.0.1:{self.server.server_address[1]}/elsewhere"}
        self.send_response(307 if kind == "redirect" else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        if kind == "endless":
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            self._endless()
            return
        announced = MAX_ANSWER_BYTES + 1 if kind == "long" else len(body)
        self.send_header("content-length", str(announced))
        self.end_headers()
        self.wfile.write(body)

    def _endless(self) -> None:
        piece = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        try:
            while True:
                self.wfile.write(piece)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def asked(url: str, kind: type = RuntimeClient) -> str:
    client = kind(url)
    try:
        return str(client.AcquireTask(AcquireTaskRequest()).token)
    finally:
        client.close()


@pytest.mark.parametrize("kind", ["gzip", "twice", "long", "endless"])
def test_an_answer_that_swells_or_does_not_end_is_given_up(address: str, kind: str) -> None:
    with pytest.raises(httpx.DecodingError, match=r"compressed|more than"):
        asked(f"{address}/{kind}")


def test_flowers_own_client_inflates(address: str) -> None:
    """What the wrapper is for; zeros are no message, and Flower says so after it has inflated all of them."""
    with pytest.raises(ValueError, match="Invalid protobuf"):
        asked(f"{address}/gzip", RuntimeHttpClient)


def test_no_redirect_is_followed(address: str) -> None:
    Liar.asked.clear()
    with pytest.raises(httpx.HTTPStatusError):
        asked(f"{address}/redirect")
    assert [path.split("/")[1] for path in Liar.asked] == ["redirect"]


def test_no_proxy_of_the_environment_is_asked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = RecordingProxy()
    for name, value in proxy.environment().items():
        monkeypatch.setenv(name, value)
    assert asked(f"{address}/honest") == "honest"
    assert proxy.heads == []
    with pytest.raises(httpx.HTTPStatusError):  # Flower's own client asks the proxy, which is none for HTTP
        asked(f"{address}/honest", RuntimeHttpClient)
    assert len(proxy.heads) == 1
    proxy.close()


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:1", "no address", "ftp://x"])
def test_an_environment_that_httpx_cannot_read_does_no_harm(
    address: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", value)
    assert asked(f"{address}/honest") == "honest"


def test_a_child_process_inherits_no_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in RecordingProxy().environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OFFSITE_KEPT", "kept")
    program = tmp_path / "show.py"
    program.write_text("import os\nprint(*(f'{k}={v}' for k, v in os.environ.items()), 'end', sep='\\n')\n")
    log = tmp_path / "log"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = FlowerProcess("show", [], log=log, home=tmp_path / "home", environment={"OFFSITE_PROXY": "http://own:1"})
    process.start()
    wait_for(lambda: "end" in log.read_text(), 60)
    process.stop()
    lines = log.read_text().splitlines()
    assert [line for line in lines if names_proxy(line.partition("=")[0])] == ["OFFSITE_PROXY=http://own:1"]
    assert "OFFSITE_KEPT=kept" in lines


def test_variables_about_proxies() -> None:
    named = ("http_proxy", "HTTPS_PROXY", "All_Proxy", "grpc_proxy", "NO_PROXY", "no_grpc_proxy", "ws_proxy")
    by_address = ("GRPC_ADDRESS_HTTP_PROXY", "GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES")
    environment = dict.fromkeys([*named, *by_address, "PROXY", "PATH", "http_proxy_of_mine"], "x") | {"FTP_PROXY": ""}
    assert proxy_variables(environment) == sorted([*named, *by_address])
    assert set(without_proxies(environment)) == {"PROXY", "PATH", "http_proxy_of_mine"}


@pytest.mark.parametrize("url", ["", "http://proxy.example:3128", "http://u:p%40w@10.0.0.1:8080/", "http://[::1]:3128"])
def test_an_address_of_a_proxy(url: str) -> None:
    check_proxy(url)
    assert "p%40w" not in shown_proxy(url)


@pytest.mark.parametrize(
    "url",
    [
        "proxy.example:3128",
        "https://p:1",
        "socks5://p:1",
        "http://p",
        "http://:1",
        "http://u:secret@p:1/x",
        "http://p:x",
        "http://p:1?q",
        "http://p:99999",
        "http://p:1\n",
    ],
)
def test_another_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="must be like") as caught:
        check_proxy(url)
    assert "secret" not in str(caught.value)
