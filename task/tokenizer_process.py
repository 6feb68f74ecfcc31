"""The program of a tokenizer's process; `task.tokenizer` starts this file by its path, without the rest of the package.

Input is a sequence of frames, each four bytes of length and then the content: tokenizer.json, the end-of-text token,
the chat template with its tokens as JSON, and then JSON requests. Output is one frame for the first three together,
with facts as JSON, and one frame for each request, with little-endian uint32. A template is a program by the model's
owner: it is compiled in jinja's sandbox, and before the first record arrives this process gives up its rights to open
files and sockets, to write to files and to start other processes.
"""

import contextlib
import json
import resource
import struct
import sys
from array import array
from collections.abc import Callable, Iterable
from typing import Any

MEMORY = 4 << 30
IDS_PER_BYTE, SPARE_IDS = 32, 1024  # no honest tokenizer makes more ids from a text; a longer result is dropped
NONE = 0xFFFFFFFF
OPEN_FILES = 3  # standard input, output and error, which are already open
Render = Callable[..., str]


def read() -> bytes | None:
    """Returns the content of the next frame, or None at the end of the input."""
    head = sys.stdin.buffer.read(4)
    return sys.stdin.buffer.read(struct.unpack("<I", head)[0]) if len(head) == 4 else None


def write(content: bytes) -> None:
    """Writes one frame."""
    sys.stdout.buffer.write(struct.pack("<I", len(content)) + content)
    sys.stdout.buffer.flush()


def packed(*columns: Iterable[int]) -> bytes:
    """Returns columns of numbers one after the other, as little-endian uint32."""
    words = array("I", [number for column in columns for number in column])
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def plain(tokenizer: Any, request: Any) -> bytes:
    """Returns the ids of a text, without special tokens."""
    text = request["of"]
    tokenizer.no_truncation()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    limit = IDS_PER_BYTE * len(text.encode("utf-8", "surrogatepass")) + SPARE_IDS
    return packed(ids if len(ids) <= limit else [])


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
    template, tokens = sandbox.from_string(settings["template"]), settings["tokens"]

    def render(messages: list[dict[str, str]], *, prompt: bool = False) -> str:
        return template.render(messages=messages, add_generation_prompt=prompt, **tokens)

    return render


def limit(memory: int) -> None:
    """Gives up rights that no tokenizer needs; a limit that is already lower stays."""
    for name, most in (
        ("RLIMIT_AS", memory),
        ("RLIMIT_NOFILE", OPEN_FILES),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_CORE", 0),
    ):
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        low = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (low, low))


def main() -> None:
    """Serves one parent process until it closes the pipe."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str((read() or b"").decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    eos = (read() or b"").decode()
    settings = json.loads(read() or b"null")
    render = renderer(settings) if settings else None
    with contextlib.suppress(BaseException):
        tokenizer.encode(["a"], is_pretokenized=True)  # the library must start its thread before `limit` forbids it
    limit(MEMORY)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    write(json.dumps({"eos": tokenizer.token_to_id(eos) if eos else None, "largest": largest}).encode())
    while (content := read()) is not None:
        try:
            request = json.loads(content)
            if request["kind"] == "chat" and render is not None:
                write(chat(tokenizer, request, render))
            elif request["kind"] == "text":
                write(plain(tokenizer, request))
            else:
                write(full(tokenizer, request))
        except BaseException:  # a panic of the library's Rust code is no Exception
            write(b"")


if __name__ == "__main__":
    main()
