"""The program of a tokenizer's processes; `task.tokenizer_worker` starts this file by its path, without the package.

Standard input is a socket. Through it come two frames, each four bytes of length and then the content: tokenizer.json,
and the settings of `task.tokenizer_settings` as JSON. One frame with facts as JSON goes back. Then each message of
eight bytes, the limits of CPU time and wall time in seconds, brings the socket of one record. The program forks, and
the copy gives up its rights to open files and sockets, to write to files and to start other processes. The copy reads
the record's request, a frame of JSON, from the record's socket, answers with little-endian uint32, and ends; then one
byte with the outcome goes back. The program itself never sees a record and never renders a template, so every copy
starts from the same state.
"""

import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import resource
import signal
import socket
import struct
import sys
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MEMORY = 4 << 30
NO_CHAT = 2  # answer about a template that takes no plain conversation; else 1 or 0 for whether it shows answers
OPEN_FILES = 3  # standard input, output and error, which are already open
FINE, FAILED, STOPPED = range(3)  # outcomes, as in `task.tokenizer_worker`
LATE = (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM)  # the kernel's ways to end a process at its limit of time
Columns = tuple[Iterable[int], ...]
Answer = Callable[[Any], Columns]


def read(descriptor: int) -> bytes | None:
    """Returns the content of the next frame, or None at the end of the input."""
    head = taken(descriptor, 4)
    return taken(descriptor, struct.unpack("<I", head)[0]) if len(head) == 4 else None


def taken(descriptor: int, size: int) -> bytes:
    """Returns `size` bytes; fewer at the end of the input."""
    content = bytearray()
    while len(content) < size and (piece := os.read(descriptor, min(size - len(content), 1 << 20))):
        content += piece
    return bytes(content)


def write(descriptor: int, content: bytes) -> None:
    """Writes all bytes."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def packed(*columns: Iterable[int]) -> bytes:
    """Returns columns of numbers one after the other, as little-endian uint32."""
    words = array("I", [number for column in columns for number in column])
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def chat(rules: Any, request: Any, render: Any, chat_template: Any) -> Columns:
    """Returns two columns of a conversation: ids, and 1 for each token inside an answer of the assistant, else 0."""
    whole, spans = chat_template.answers_of(request["of"], render)
    encoding, length = rules.rendered(whole, special=request["special"]), request["length"]
    kept = encoding.offsets[:length]
    flags = (int(any(first <= start < end <= last for first, last in spans)) for start, end in kept)
    return encoding.ids[:length], flags


def sibling(name: str) -> Any:
    """Returns a module of this folder, loaded by its path, since the package is not importable here."""
    spec: Any = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def limit(memory: int, seconds: int, wall: int) -> None:
    """Gives up rights that no tokenizer needs, and limits this process; a limit that is already lower stays.

    Args:
      memory: bytes of address space.
      seconds: CPU time, which counts from this process's own start.
      wall: seconds after which the process ends even if it only waits.
    """
    for name, most in (
        ("RLIMIT_AS", memory),
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_NOFILE", OPEN_FILES),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_CORE", 0),
    ):
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        low = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (low, low))
    signal.alarm(wall)


def answer_one(connection: int, seconds: int, wall: int, answer: Answer) -> None:
    """Answers the request of one record, as a process that has nothing but the record's socket."""
    for target in (0, 1):
        os.dup2(connection, target)
    os.closerange(OPEN_FILES, max(connection + 1, 256))
    limit(MEMORY, seconds, wall)
    content = read(0)
    if content is not None:
        write(1, packed(*answer(json.loads(content))))


def serve(control: socket.socket, answer: Answer) -> None:
    """Forks for each record until the other side closes the socket; records come one after another."""
    while True:
        terms, connections, _, _ = socket.recv_fds(control, 8, 1)
        if len(terms) < 8 or not connections:
            return
        process = os.fork()
        if process == 0:
            outcome = FAILED
            with contextlib.suppress(BaseException):  # a panic of the library's Rust code is no Exception
                seconds, wall = struct.unpack("<II", terms)
                answer_one(connections[0], seconds, wall, answer)
                outcome = FINE
            os._exit(outcome)
        os.close(connections[0])
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        control.sendall(bytes([FINE if code == FINE else STOPPED if code in LATE else FAILED]))


def touch_no_more_than_needed() -> None:
    """Prepares the memory of this process for its copies; whatever a copy touches has to be copied first.

    Garbage collection would touch all objects. Memory that is free since the tokenizer was read would be put in order
    by the first large allocation of each copy: measured, 2,200 pages and 11 ms for each record instead of 540 and 5.
    """
    gc.collect()
    gc.freeze()
    with contextlib.suppress(AttributeError, OSError):  # a C library without this function
        ctypes.CDLL(None).malloc_trim(0)


def answerer(rules: Any, settings: dict[str, Any], chat_template: Any) -> Answer:
    """Returns the function from a request to its answer."""
    template, tokens = settings["template"], settings["tokens"]
    render: Any = chat_template.renderer(template, tokens, settings["date"]) if template else None

    def answer(request: Any) -> Columns:
        if request["kind"] == "ids":
            return (map(ord, rules.text(request["of"])),)
        if request["kind"] == "prompt":
            asked = rules.rendered(render(request["of"], prompt=True), special=request["special"])
            return (asked.ids[: request["length"]],)
        if request["kind"] == "chat":
            return chat(rules, request, render, chat_template)
        if request["kind"] == "template":
            finds = chat_template.finds_answers(render)
            return ([NO_CHAT if finds is None else int(finds)],)
        columns: Columns = rules.plain(request) if request["kind"] == "text" else rules.full(request)
        return columns

    return answer


def main() -> None:
    """Serves one parent process until it closes the socket."""
    with contextlib.suppress(OSError):  # Linux: if memory runs out, a copy ends, and not the site's own program
        Path("/proc/self/oom_score_adj").write_text("1000")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    tokenizer_rules, chat_template = sibling("tokenizer_rules"), sibling("chat_template")
    control = socket.socket(fileno=0)
    content, settings = (read(0) or b"").decode(), json.loads(read(0) or b"null")
    rules = tokenizer_rules.Rules(content, settings)
    del content
    answer = answerer(rules, settings, chat_template)
    facts = json.dumps(rules.facts()).encode()
    control.sendall(struct.pack("<I", len(facts)) + facts)
    touch_no_more_than_needed()
    serve(control, answer)


if __name__ == "__main__":
    main()
