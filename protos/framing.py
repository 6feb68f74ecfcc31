"""A message as a head and a tail: a protobuf message of at most 1 GiB, and the vector behind it of any length.

Protobuf ends at 2 GiB, and copies each field several times. So a vector follows the head as it is: writing takes one
copy, and reading none. A frame has no limit of its own: the carrier refuses what is longer than any message of the job
before it is put together, see `protos.flower_pieces`.
"""

from typing import Any

from offsite.errors import MalformedMessage

MAX_HEAD_BYTES = 1 << 30
LENGTH_BYTES = 4


def join(head: bytes, tail: Any = b"") -> bytes:
    """Returns a message: the head's length in 4 bytes, big endian, the head, and the tail.

    Args:
      head: protobuf message that names the tail's length.
      tail: bytes, or a contiguous array, whose bytes follow as they are.
    """
    return b"".join((len(head).to_bytes(LENGTH_BYTES, "big"), head, tail))


def split(data: bytes) -> tuple[bytes, memoryview]:
    """Returns the head of a message and, without a copy, its tail.

    Raises:
      MalformedMessage: the head is too long, or not all of it is there.
    """
    size = int.from_bytes(data[:LENGTH_BYTES], "big")
    if size > MAX_HEAD_BYTES:
        raise MalformedMessage(f"head_bytes={size}: above the limit {MAX_HEAD_BYTES}; refuse it")
    if len(data) < LENGTH_BYTES + size:
        raise MalformedMessage(f"message_bytes={len(data)}: its head ends at {LENGTH_BYTES + size}; was it cut off")
    return data[LENGTH_BYTES : LENGTH_BYTES + size], memoryview(data)[LENGTH_BYTES + size :]


def check_tail(announced: int, tail: memoryview) -> None:
    """Compares a tail with the length that the head names.

    Raises:
      MalformedMessage: the tail is longer or shorter.
    """
    if announced != len(tail):
        raise MalformedMessage(f"tail_bytes={len(tail)}: the head names {announced}; was it cut off")
