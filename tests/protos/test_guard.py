"""The lock in front of Flower's programs: what answers without the secret, for every spelling of a path."""

import asyncio
import contextlib
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from flwr.app.message import array
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from offsite.coordinator.network.superlink import PUBLIC, limits_for
from offsite.errors import ConfigError
from offsite.protos.flower import pack
from offsite.protos.flower_pieces import pieces_of
from offsite.protos.guard import (
    CONTENT,
    HEADER,
    MAX_BODY_BYTES,
    MAX_OBJECT_BYTES,
    VARIABLE,
    Guard,
    RequestLimits,
    new_secret,
    secret_of_environment,
)

LIMITS = limits_for(1 << 20)
SECRET = "5ec4e7" * 10
PRIVATE = ("/v1/control/start", "/flwr.proto.Runtime/AcquireTask", "/v1/serverappio/x", "/openapi.json", "/docs", "/")
HEALTH = (b"x-offsite-secret", SECRET.encode())
PROTOBUF = (b"content-type", PROTOBUF_MEDIA_TYPE.encode())


def ask(
    path: str,
    *headers: tuple[bytes, bytes],
    public: tuple[str, ...] = PUBLIC,
    kind: str = "http",
    method: str = "GET",
) -> Any:
    """Returns what an application behind the guard was asked, and the response, for one request."""
    reached: list[str] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope.get("path", scope["type"]))

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "method": method, "path": path, "raw_path": path.encode(), "headers": list(headers)}
    asyncio.run(Guard(app, SECRET, public)(scope, receive, send))
    return reached, sent


@pytest.mark.parametrize("path", ["/health", "/v1/fleet/", "/v1/fleet/register", "/v1/fleet/a/b"])
def test_public_paths_need_no_secret(path: str) -> None:
    assert ask(path) == ([path], [])


@pytest.mark.parametrize(
    "path",
    [
        *PRIVATE,
        *("/v1/fleet", "/v1/fleetx", "/v1/FLEET/x", "/V1/fleet/x", "v1/fleet/x", "//v1/fleet/x", "/./v1/fleet/x"),
        *("/health/", "/healthy", "/Health", "/health/../v1/control/start", "/health;x", "/health\0", "/health ", ""),
        *("/%76%31/fleet/x", "/v1%2ffleet%2fx", "/v1\\fleet\\x", "/x/v1/fleet/y", "http://h/v1/fleet/x"),
    ],
)
def test_everything_else_is_not_there(path: str) -> None:
    reached, sent = ask(path)
    assert reached == []
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 404
    assert sent[1]["body"] == b""
    assert ask(path, HEALTH)[0] == [path]
    assert ask("/health", public=())[0] == []


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("",),
        ("text/plain",),
        ("Application/Protobuf",),
        ("application/protobuf; charset=x",),
        ("application/x-protobuf",),
        ("application/protobuf", "application/protobuf"),
        ("words of a stranger", "application/protobuf"),
    ],
)
def test_a_content_that_flowers_client_does_not_name_is_refused_unread(given: tuple[str, ...]) -> None:
    """Flower would write the content type into its log."""
    headers = [(b"content-type", one.encode()) for one in given]
    for path in ("/v1/fleet/push-object", "/health"):
        reached, sent = ask(path, *headers, method="POST")
        assert reached == []
        assert sent[0]["status"] == 415
        assert (b"connection", b"close") in sent[0]["headers"]
    assert ask("/docs", *headers, method="POST")[1][0]["status"] == 404
    assert ask("/docs", *headers, HEALTH, method="POST")[0] == ["/docs"]
    assert ask("/health", *headers)[0] == ["/health"]


def test_what_flowers_client_sends_is_let_in() -> None:
    assert PROTOBUF_MEDIA_TYPE.encode() == CONTENT
    assert ask("/v1/fleet/push-object", PROTOBUF, method="POST") == (["/v1/fleet/push-object"], [])


WRONG = {
    "none": [],
    "empty": [(b"x-offsite-secret", b"")],
    "shorter": [(b"x-offsite-secret", SECRET[:-1].encode())],
    "longer": [(b"x-offsite-secret", SECRET.encode() + b"0")],
    "space": [(b"x-offsite-secret", b" " + SECRET.encode())],
    "other case": [(b"x-offsite-secret", SECRET.upper().encode())],
    "not ascii": [(b"x-offsite-secret", "ü".encode())],
    "twice": [HEALTH, HEALTH],
    "right and wrong": [HEALTH, (b"x-offsite-secret", b"x")],
    "wrong and right": [(b"x-offsite-secret", b"x"), HEALTH],
    "other name": [(b"x-offsite-secre", SECRET.encode()), (b"authorization", SECRET.encode())],
    "list": [(b"x-offsite-secret", SECRET.encode() + b"," + SECRET.encode())],
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_secret_that_is_not_exactly_the_one(headers: list[tuple[bytes, bytes]], kind: str) -> None:
    for path in PRIVATE:
        reached, sent = ask(path, *headers, kind=kind)
        assert reached == []
        assert sent


def test_every_other_character_of_the_secret_counts() -> None:
    for place in range(len(SECRET)):
        wrong = SECRET[:place] + ("0" if SECRET[place] != "0" else "1") + SECRET[place + 1 :]
        assert ask("/docs", (b"x-offsite-secret", wrong.encode()))[0] == []


def test_a_websocket_is_closed_before_it_is_accepted() -> None:
    reached, sent = ask("/v1/control/stream", kind="websocket")
    assert reached == []
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert ask("/v1/control/stream", HEALTH, kind="websocket") == (["/v1/control/stream"], [])


def test_start_and_end_of_the_program_pass() -> None:
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    async def nothing(*_: Any) -> Any:
        return {}

    asyncio.run(Guard(app, SECRET, ())({"type": "lifespan"}, nothing, nothing))
    assert reached == ["lifespan"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "noted"),
    [
        ("POST", "/v1/fleet/pull-messages", [PROTOBUF], 200, [False, True]),
        ("POST", "/v1/fleet/pull-messages", [PROTOBUF], 401, [False]),
        ("POST", "/v1/fleet/pull-messages", [], 200, [False]),
        ("GET", "/health", [], 200, [False, False]),
        ("GET", "/docs", [], 200, [False]),
        ("GET", "/docs", [HEALTH], 200, [True]),
    ],
)
def test_a_peer_is_known_by_the_secret_or_by_a_post_that_succeeds(
    method: str, path: str, headers: list[tuple[bytes, bytes]], status: int, noted: list[bool]
) -> None:
    """What a header says of its sender's address counts for nothing."""
    notes: list[tuple[tuple[str, int], bool]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": method, "path": path, "client": ("10.0.0.1", 5)}
    scope["headers"] = [*headers, (b"x-forwarded-for", b"10.9.9.9")]
    guard = Guard(app, SECRET, PUBLIC, note=lambda peer, known: notes.append((peer, known)))
    asyncio.run(guard(scope, receive, send))
    assert notes == [(("10.0.0.1", 5), known) for known in noted]


def body_of(*pieces: bytes, announced: bytes | None = None, path: str = "/v1/fleet/x", secret: bool = False) -> Any:
    """Returns the body that an application got in pieces, its status, and how many pieces were requested."""
    got: list[Any] = []
    sent: list[Any] = []
    asked: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        whole = b""
        while (message := await receive())["type"] == "http.request":
            whole += message["body"]
            if not message["more_body"]:
                got.append(whole)
                return
        got.append(message["type"])

    async def receive() -> Any:
        if len(asked) == len(pieces):
            return {"type": "http.disconnect"}
        asked.append(pieces[len(asked)])
        more = len(asked) < len(pieces) or pieces[-1] == b"cut"
        return {"type": "http.request", "body": asked[-1], "more_body": more}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [PROTOBUF, *[(b"content-length", announced)] * (announced is not None), *[HEALTH] * secret]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    limits = RequestLimits(body=10, longer={"/v1/fleet/long": 20})
    asyncio.run(Guard(app, SECRET, PUBLIC, limits)(scope, receive, send))
    return got, [message.get("status") for message in sent[:1]], len(asked)


def test_a_body_up_to_the_limit_arrives_as_it_was_sent() -> None:
    assert body_of(b"0123456789") == ([b"0123456789"], [], 1)
    assert body_of(b"0123", b"", b"456789", announced=b"10") == ([b"0123456789"], [], 3)
    assert body_of(b"") == ([b""], [], 1)


@pytest.mark.parametrize("announced", [b"11", b"9" * 20, b"9" * 5000, b"0" * 5 + b"11"])
def test_a_body_announced_beyond_the_limit_is_refused_unread(announced: bytes) -> None:
    assert body_of(b"x", announced=announced) == ([], [413], 0)


@pytest.mark.parametrize("announced", [None, b"3", b"-1", b"x"])
def test_a_body_that_grows_beyond_the_limit_is_refused_there(announced: bytes | None) -> None:
    assert body_of(b"01234", b"56789", b"!", b"never asked for", announced=announced) == ([], [413], 3)


@pytest.mark.parametrize("path", ["/v1/fleet/push-messages", "/v1/fleet/long/", "/v1/fleet//long", "/v1/fleet/Long"])
def test_only_the_paths_that_are_named_take_a_longer_body(path: str) -> None:
    assert body_of(b"x" * 20, path="/v1/fleet/long") == ([b"x" * 20], [], 1)
    assert body_of(b"x" * 20, b"!", path="/v1/fleet/long") == ([], [413], 2)
    assert body_of(b"x" * 11, path=path) == ([], [413], 1)
    assert body_of(b"x", path=path, announced=b"11") == ([], [413], 0)


class Crowd:
    """Peers at one guard, each of which sends its pieces on command."""

    def __init__(self, limits: RequestLimits) -> None:
        self.served: list[bytes] = []
        self.answer = asyncio.Event()
        self._guard = Guard(self._app, SECRET, PUBLIC, limits)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.served.append((await receive())["body"])
        await self.answer.wait()

    def begin(self, *pieces: bytes, whole: bool = True) -> "asyncio.Task[list[int]]":
        """Starts a request and returns its statuses; a request that is not whole sends nothing more."""
        left, sent = list(pieces), []

        async def receive() -> Any:
            if not left:
                await asyncio.Event().wait()
            piece = left.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(left) or not whole}

        async def send(message: Any) -> None:
            sent.append(message)

        async def run() -> list[int]:
            scope = {"type": "http", "method": "POST", "path": "/v1/fleet/x", "headers": [PROTOBUF]}
            await self._guard(scope, receive, send)
            return [message["status"] for message in sent if "status" in message]

        return asyncio.create_task(run())


def test_a_body_that_does_not_come_is_given_up() -> None:
    async def run() -> None:
        crowd = Crowd(RequestLimits(seconds=0.05))
        assert await asyncio.wait_for(crowd.begin(b"0", b"1", whole=False), 10) == [408]
        assert await asyncio.wait_for(crowd.begin(whole=False), 10) == [408]
        assert crowd.served == []
        slow = crowd.begin(b"whole")  # work on a whole body has no time limit
        await asyncio.sleep(0.2)
        assert not slow.done()
        crowd.answer.set()
        assert await slow == []
        assert crowd.served == [b"whole"]

    asyncio.run(run())


def test_all_peers_together_take_only_so_much_memory() -> None:
    async def run() -> None:
        crowd = Crowd(RequestLimits(body=10, held=20))
        held = [crowd.begin(b"0123456789"), crowd.begin(b"01234", b"5678", whole=False)]
        await asyncio.sleep(0.01)
        assert await asyncio.wait_for(crowd.begin(b"0", b"12"), 10) == [503]
        assert await asyncio.wait_for(crowd.begin(b"0", b"12", whole=False), 10) == [503]
        held.append(crowd.begin(b"!"))
        await asyncio.sleep(0.01)
        assert crowd.served == [b"0123456789", b"!"]
        held[1].cancel()  # as when a connection is lost
        crowd.answer.set()
        assert [await held[0], await held[2]] == [[], []]
        assert await crowd.begin(b"0123456789") == []
        assert await asyncio.gather(crowd.begin(b"a" * 10), crowd.begin(b"b" * 10)) == [[], []]

    asyncio.run(run())


def test_a_peer_that_goes_away_left_no_body() -> None:
    assert body_of(b"0123", b"cut") == (["http.disconnect"], [], 2)


def test_this_machine_may_send_more() -> None:
    assert body_of(b"x" * 50, announced=b"50", secret=True) == ([b"x" * 50], [], 1)


@pytest.mark.parametrize("piece", [1 << 20, 5 << 20])
def test_what_an_honest_site_pushes_is_below_the_limit(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks every object of a long message."""
    monkeypatch.setattr(array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", piece)
    record = pack("masked", os.urandom(12 << 20))
    objects = [one.deflate() for one in get_all_nested_objects(record).values()]
    assert max(map(len, objects)) > piece
    assert max(map(len, objects)) + 1000 < LIMITS.of("/v1/fleet/push-object") == MAX_OBJECT_BYTES


@pytest.mark.parametrize("largest", [1 << 30, 60 << 30])
def test_every_other_request_of_an_honest_site_is_below_the_limit(
    largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest request lists the pieces of the job's longest message, here of 1 GiB and of 60 GiB."""
    monkeypatch.setattr(array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 1 << 20)
    tree = get_object_tree(pack("masked", os.urandom(12 << 20)))
    pieces = next(one for one in nodes(tree) if len(one.children) >= 12)
    more = pieces_of(largest) + 1 - len(pieces.children)
    pieces.children.extend(ObjectTree(object_id=os.urandom(32).hex()) for _ in range(more))
    node = Node(node_id=2**64 - 1)
    message = Message(metadata=Metadata(run_id=2**64 - 1, message_id="f" * 64, reply_to_message_id="f" * 64))
    longest = PushMessagesRequest(
        node=node, messages_list=[message], message_object_trees=[tree], clientapp_runtime_list=[1.5]
    ).ByteSize()
    limits = limits_for(largest)
    assert longest < limits.of("/v1/fleet/push-messages") * 3 // 4
    assert limits.of("/v1/fleet/push-messages") < max(MAX_BODY_BYTES + 1, 2 * longest)  # no more than the job needs
    assert limits.of("/v1/fleet/pull-messages") == MAX_BODY_BYTES == 128 << 10
    assert 2 * longest < limits.held
    short = (
        PullMessagesRequest(node=node),
        ActivateNodeRequest(public_key=bytes(120), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL),
        SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL),
    )
    assert max(one.ByteSize() for one in short) < 1000


def nodes(tree: ObjectTree) -> Iterator[ObjectTree]:
    yield tree
    for child in tree.children:
        yield from nodes(child)


class Program:
    """Routes as Flower has them, on a real port behind the guard; keeps the private paths that were reached."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.largest = 0
        routes = [
            Route("/health", self._public),
            Mount(
                "/v1/fleet",
                routes=[
                    Route("/ping", self._public, methods=["GET", "POST"]),
                    Route("/size", self._size, methods=["POST"]),
                    Route("/push-object", self._size, methods=["POST"]),
                ],
            ),
            Route("/v1/control/start", self._private, methods=["GET", "POST"]),
            WebSocketRoute("/v1/control/stream", self._socket),
        ]
        app = Starlette(routes=routes)
        app.add_middleware(Guard, secret=SECRET, public=PUBLIC, limits=LIMITS)
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True)
        self._thread.start()
        until = time.monotonic() + 120
        while not self._server.started and time.monotonic() < until:
            time.sleep(0.01)

    def raw(self, target: str, *lines: str, method: str = "GET") -> int:
        """Returns the status of a request whose target is sent exactly as given."""
        head = [f"{method} {target} HTTP/1.1", "Host: x", "Connection: close", "Content-Length: 0", *lines]
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as wire:
            wire.sendall("\r\n".join([*head, "", ""]).encode())
            answer = b""
            while b"\r\n" not in answer and (piece := wire.recv(4096)):
                answer += piece
        return int(answer.split()[1])

    def sends(self, body: Iterator[bytes], *lines: str, path: str = "push-object") -> tuple[int, int]:
        """Returns the status of a body sent in pieces until an answer or a cut, and the number of bytes sent."""
        content = f"Content-Type: {PROTOBUF_MEDIA_TYPE}"
        head = [f"POST /v1/fleet/{path} HTTP/1.1", "Host: x", content, *lines, "", ""]
        moved, answer = 0, b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as wire:
            wire.sendall("\r\n".join(head).encode())
            with contextlib.suppress(ConnectionError):
                for piece in body:
                    if select.select([wire], [], [], 0)[0]:
                        break
                    wire.sendall(piece)
                    moved += len(piece)
            with contextlib.suppress(ConnectionError):
                answer = wire.recv(4096)
        return int(answer.split()[1]) if answer else 0, moved

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._listener.close()

    async def _public(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse("public")

    async def _size(self, request: Request) -> PlainTextResponse:
        self.largest = max(self.largest, len(await request.body()))
        return PlainTextResponse("read")

    async def _private(self, request: Request) -> PlainTextResponse:
        self.reached.append(request.url.path)
        return PlainTextResponse("private")

    async def _socket(self, socket: WebSocket) -> None:
        self.reached.append("socket")
        await socket.close()


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    made = Program()
    try:
        yield made
    finally:
        made.stop()


def test_over_http_only_what_peers_need_answers(program: Program) -> None:
    program.reached.clear()
    assert program.raw("/health") == program.raw("/v1/fleet/ping") == program.raw("/v1/fleet/ping?x=../..") == 200
    for method in ("GET", "POST", "PUT", "HEAD", "OPTIONS", "TRACE", "start"):
        assert program.raw("/v1/control/start", method=method) in (400, 404)
    assert program.reached == []
    assert program.raw("/v1/control/start", f"{HEADER}: {SECRET}") == 200
    assert program.raw("/v1/control/start", f"{HEADER.upper()}:   {SECRET}", method="POST") == 200
    assert program.reached == ["/v1/control/start"] * 2


@pytest.mark.parametrize(
    "target",
    [
        "/v1/fleet/../control/start",
        "/v1/fleet/%2e%2e/control/start",
        "/v1/fleet/%2E%2E%2Fcontrol%2Fstart",
        "/v1/fleet/..%2f..%2fv1/control/start",
        "/v1/fleet/x/../../../v1/control/start",
        "/v1/fleet//../control/start",
        "/v1/fleet/..;/control/start",
        "/v1/fleet/..%5ccontrol/start",
        "/v1/fleet/%252e%252e/control/start",
        "/v1/fleet/%00/../../v1/control/start",
        "/v1/./control/start",
        "/v1/control//start",
        "//v1/control/start",
        "/%76%31/control/start",
        "/v1/control/start/",
        "/v1/control/start?/v1/fleet/",
        "/v1/control/start#/v1/fleet/",
        "http://x/v1/control/start",
        "http://x/v1/fleet/../control/start",
        "/health/../v1/control/start",
        "/health%2f..%2fv1/control/start",
    ],
)
def test_no_spelling_of_a_path_reaches_what_is_private(program: Program, target: str) -> None:
    program.reached.clear()
    for lines in ((), (f"{HEADER}: wrong",), ("X-Forwarded-Prefix: /v1/fleet", "X-Original-URL: /health")):
        assert program.raw(target, *lines) != 200
        assert program.raw(target, *lines, method="POST") != 200
    assert program.reached == []


def test_over_http_a_body_without_end_is_cut_off(program: Program) -> None:
    """A refused peer sees 413, or loses its connection while it still sends."""
    piece = bytes(1 << 16)
    chunked = (b"%x\r\n" % len(piece) + piece + b"\r\n" for _ in range(4096))
    status, moved = program.sends(chunked, "Transfer-Encoding: chunked")
    assert status in (0, 413)
    assert moved < MAX_OBJECT_BYTES + (16 << 20)  # the rest lies in the buffers of both sockets
    status, moved = program.sends((piece for _ in range(4096)), f"Content-Length: {4096 * len(piece)}")
    assert status in (0, 413)
    assert moved < 16 << 20
    assert program.largest == 0
    for path, most in (("size", MAX_BODY_BYTES), ("push-object", MAX_OBJECT_BYTES)):
        whole = iter([bytes(most)])
        lines = (f"Content-Length: {most}", "Connection: close")
        assert program.sends(whole, *lines, path=path)[0] == 200
        assert program.largest == most
    lines = (f"Content-Length: {MAX_BODY_BYTES + 1}", "Connection: close")
    assert program.sends(iter([]), *lines, path="size")[0] == 413


def test_headers_that_a_peer_can_send_do_not_open_it(program: Program) -> None:
    program.reached.clear()
    for lines in (
        (f"{HEADER}: {SECRET}", f"{HEADER}: {SECRET}"),
        (f"{HEADER}: {SECRET}", f"{HEADER}: x"),
        (f"{HEADER}: {SECRET}, {SECRET}",),
        (f"{HEADER.replace('-', '_')}: {SECRET}",),
        (f"Cookie: {HEADER}={SECRET}",),
        ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: x"),
    ):
        assert program.raw("/v1/control/start", *lines) in (400, 404)
        assert program.raw(f"/v1/control/start?{HEADER}={SECRET}") == 404
    assert program.reached == []


def test_a_secret_lies_in_a_file_that_only_its_user_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "guard"
    previous = os.umask(0)
    try:
        first = new_secret(path)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(bytes.fromhex(first)) == 32
    monkeypatch.setenv(VARIABLE, str(path))
    assert secret_of_environment() == first
    assert new_secret(path) != first == first.lower()
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ConfigError, match=f"{VARIABLE}: not set"):
        secret_of_environment()


def test_a_link_that_waits_where_the_secret_goes_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("kept")
    (tmp_path / "guard").symlink_to(target)
    secret = new_secret(tmp_path / "guard")
    assert target.read_text() == "kept"
    assert not (tmp_path / "guard").is_symlink()
    assert (tmp_path / "guard").read_text() == secret
