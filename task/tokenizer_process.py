"""The process in which a tokenizer works; `task.tokenizer` starts it, by this file's path and without the rest of us.

In come frames of four bytes' length and content: tokenizer.json, the end-of-text token, the chat template with its
tokens as JSON, then one request after the other, JSON. Out comes one frame for each but the first two: facts as JSON,
then what a request asks for, little-endian uint32. A template is a program of the model's owner: it is compiled in
jinja's sandbox, and before the first record comes this process has given up its right to open files and sockets, to
write to files and to start others.
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
IDS_PER_BYTE, SPARE_IDS = 32, 1024  # no honest tokenizer makes more of a text; one that does is given nothing for it
NONE = 0xFFFFFFFF
OPEN_FILES = 3  # standard input, output and error, which are open
Render = Callable[..., str]


def read() -> bytes | None:
    """Returns the next frame, None at the end."""
    head = sys.stdin.buffer.read(4)
    return sys.stdin.buffer.read(struct.unpack("<I", head)[0]) if len(head) == 4 else None


def write(content: bytes) -> None:
    """Writes a frame."""
    sys.stdout.buffer.write(struct.pack("<I", len(content)) + content)
    sys.stdout.buffer.flush()


def packed(*columns: Iterable[int]) -> bytes:
    """Returns columns of numbers one behind the other."""
    words = array("I", [number for column in columns for number in column])
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def plain(tokenizer: Any, request: Any) -> bytes:
    """Returns the ids of a text, without special tokens."""
    text = request["of"]
    tokenizer.no_truncation()
    found = tokenizer.encode(text, add_special_tokens=False).ids
    most = IDS_PER_BYTE * len(text.encode("utf-8", "surrogatepass")) + SPARE_IDS
    return packed(found if len(found) <= most else [])


def full(tokenizer: Any, request: Any) -> bytes:
    """Returns six columns of a text, a pair of texts or a list of words, with special tokens, cut to a length."""
    of, kind = request["of"], request["kind"]
    tokenizer.enable_truncation(request["length"], strategy="only_second" if kind == "pair" else "longest_first")
    found = tokenizer.encode(*of) if kind == "pair" else tokenizer.encode(of, is_pretokenized=kind == "words")
    return packed(
        found.ids,
        found.type_ids,
        (NONE if one is None else one for one in found.sequence_ids),
        (NONE if one is None else one for one in found.word_ids),
        (start for start, _ in found.offsets),
        (end for _, end in found.offsets),
    )


def chat(tokenizer: Any, request: Any, render: Render) -> bytes:
    """Returns two columns of a conversation: ids, and 1 on the tokens that lie in an answer of the assistant.

    Where an answer stands follows from the template alone: behind what it makes of the messages before it with the
    prompt for an answer, up to what it makes of them and the answer. An answer of which that is no beginning of the
    whole (as where a template strips earlier thoughts) is no target.
    """
    messages, length = request["of"], request["length"]
    whole, spans = render(messages), []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, until = render(messages[:number], prompt=True), render(messages[: number + 1])
            if until.startswith(before) and whole.startswith(until):
                spans.append((len(before), len(until)))
    tokenizer.no_truncation()
    found = tokenizer.encode(whole, add_special_tokens=False)
    kept = found.offsets[:length]
    return packed(
        found.ids[:length],
        (int(any(first <= start < end <= last for first, last in spans)) for start, end in kept),
    )


def renderer(settings: dict[str, Any]) -> Render:
    """Returns a chat template as a function of messages; raises whatever jinja raises."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as jinja wants it

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
    """Gives up what no tokenizer needs; a limit that is lower already stays."""
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
    """Serves one parent until it hangs up."""
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
        tokenizer.encode(["a"], is_pretokenized=True)  # the library starts its thread now, or never
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
