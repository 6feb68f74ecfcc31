"""The process in which a tokenizer works; `task.tokenizer` starts it, by this file's path and without the rest of us.

In come frames of four bytes' length and content: tokenizer.json, the end-of-text token, then one text after the other.
Out comes one frame for each but the first: facts as JSON, then the ids of each text, little-endian uint32.
"""

import json
import resource
import struct
import sys
from array import array
from typing import Any

MEMORY = 4 << 30
IDS_PER_BYTE, SPARE_IDS = 32, 1024  # no honest tokenizer makes more of a text; one that does is given nothing for it


def read() -> bytes | None:
    """Returns the next frame, None at the end."""
    head = sys.stdin.buffer.read(4)
    return sys.stdin.buffer.read(struct.unpack("<I", head)[0]) if len(head) == 4 else None


def write(content: bytes) -> None:
    """Writes a frame."""
    sys.stdout.buffer.write(struct.pack("<I", len(content)) + content)
    sys.stdout.buffer.flush()


def ids(tokenizer: Any, text: bytes) -> bytes:
    """Returns the ids of a text; none where the tokenizer fails on it."""
    try:
        found = tokenizer.encode(text.decode("utf-8", "surrogatepass"), add_special_tokens=False).ids
    except BaseException:  # a panic of its Rust code is no Exception
        found = []
    words = array("I", found if len(found) <= IDS_PER_BYTE * len(text) + SPARE_IDS else [])
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


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
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    write(json.dumps({"eos": tokenizer.token_to_id(eos) if eos else None, "largest": largest}).encode())
    while (text := read()) is not None:
        write(ids(tokenizer, text))


if __name__ == "__main__":
    main()
