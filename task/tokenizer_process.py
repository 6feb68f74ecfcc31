"""The program of a tokenizer's processes; `task.tokenizer_worker` starts this file by its path, without the package.

Standard input is a socket. Through it come three frames, each four bytes of length and then the content:
tokenizer.json, the end-of-text token, and the chat template with its tokens as JSON. One frame with facts as JSON goes
back. Then each message of eight bytes, the limits of CPU time and wall time in seconds, brings the socket of one
record. The program forks, and the copy gives up its rights to open files and sockets, to write to files and to start
other processes. The copy reads the record's request, a frame of JSON, from the record's socket, answers with
little-endian uint32, and ends; then one byte with the outcome goes back. The program itself never sees a record, so
every copy starts from the same state. A template is a program by the model's owner: it runs in jinja's sandbox, without
a clock, without chance and without memory of other records.
"""

import contextlib
import ctypes
import gc
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
NONE = 0xFFFFFFFF
OPEN_FILES = 3  # standard input, output and error, which are already open
FINE, FAILED, STOPPED = range(3)  # outcomes, as in `task.tokenizer_worker`
LATE = (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM)  # the kernel's ways to end a process at its limit of time
Render = Callable[..., str]
Answer = Callable[[Any], bytes]


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


def plain(tokenizer: Any, request: Any) -> bytes:
    """Returns the ids of a text, without special tokens; the first ids where the request has a length."""
    tokenizer.no_truncation()
    return packed(tokenizer.encode(request["of"], add_special_tokens=False).ids[: request["length"]])


def full(tokenizer: Any, request: Any) -> bytes:
    """Returns six columns of a text, a pair of texts or a list of words, with special tokens, cut to a length."""
    of, kind = request["of"], request["kind"]
    tokenizer.enable_truncation(request["length"], strategy="only_second" if kind == "pair" else "longest_first")
    encoding = tokenizer.encode(*of) if kind == "pair" else tokenizer.encode(of, is_pretokenized=kind == "words")
    return packed(
        encoding.ids,
        encoding.type_ids,
        (NONE if number is None else number for number in encoding.sequence_ids),
        (NONE if number is None else number for number in encoding.word_ids),
        (start for start, _ in encoding.offsets),
        (end for _, end in encoding.offsets),
    )


def chat(tokenizer: Any, request: Any, render: Render) -> bytes:
    """Returns two columns of a conversation: ids, and 1 for each token inside an answer of the assistant, else 0.

    The place of an answer follows from the template alone. The answer begins at the end of the rendered earlier
    messages with the prompt for an answer, and ends at the end of the rendered messages up to and including the answer.
    If one of these two texts is not a prefix of the next, or of the whole conversation (for example because a template
    strips earlier thoughts), the answer is not a target.
    """
    messages, length = request["of"], request["length"]
    whole, spans = render(messages), []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, until = render(messages[:number], prompt=True), render(messages[: number + 1])
            if until.startswith(before) and whole.startswith(until):
                spans.append((len(before), len(until)))
    tokenizer.no_truncation()
    encoding = tokenizer.encode(whole, add_special_tokens=False)
    kept = encoding.offsets[:length]
    return packed(
        encoding.ids[:length],
        (int(any(first <= start < end <= last for first, last in spans)) for start, end in kept),
    )


def renderer(settings: dict[str, Any]) -> Render:
    """Returns a chat template as a function from messages to text; raises any error of jinja."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja needs a set here

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise ValueError(message)

    extensions = [Generation, loopcontrols]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = lambda value, **named: json.dumps(value, ensure_ascii=False, **named)
    sandbox.globals["raise_exception"] = refuse
    del sandbox.globals["lipsum"], sandbox.filters["random"]  # a record has the same tokens every time
    template, tokens = sandbox.from_string(settings["template"]), settings["tokens"]

    def render(messages: list[dict[str, str]], *, prompt: bool = False) -> str:
        return template.render(messages=messages, add_generation_prompt=prompt, **tokens)

    return render


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
        write(1, answer(json.loads(content)))


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


def main() -> None:
    """Serves one parent process until it closes the socket."""
    with contextlib.suppress(OSError):  # Linux: if memory runs out, a copy ends, and not the site's own program
        Path("/proc/self/oom_score_adj").write_text("1000")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    from tokenizers import Tokenizer

    control = socket.socket(fileno=0)
    tokenizer = Tokenizer.from_str((read(0) or b"").decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    eos = (read(0) or b"").decode()
    settings = json.loads(read(0) or b"null")
    render = renderer(settings) if settings else None
    with contextlib.suppress(BaseException):
        tokenizer.encode(["a"], is_pretokenized=True)  # the library must import numpy before `limit` forbids it
        tokenizer.encode("a")  # what the library makes at its first use, every copy has then
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    facts = json.dumps({"eos": tokenizer.token_to_id(eos) if eos else None, "largest": largest}).encode()

    def answer(request: Any) -> bytes:
        if request["kind"] == "chat" and render is not None:
            return chat(tokenizer, request, render)
        return plain(tokenizer, request) if request["kind"] == "text" else full(tokenizer, request)

    control.sendall(struct.pack("<I", len(facts)) + facts)
    touch_no_more_than_needed()
    serve(control, answer)


if __name__ == "__main__":
    main()
