"""Canonical bytes: every field carries its length, every reader has a limit and an end.

One value has exactly one encoding, so that two sites that hash or sign the same message hash or sign the same bytes.
"""

from typing import Self

from offsite.errors import MalformedMessage

LENGTH_BYTES = 4
NUMBER_BYTES = 8
MAX_SITE_BYTES = 128
MAX_BODY_BYTES = 1 << 20


class Writer:
    """Builds a message from length-prefixed fields; big-endian numbers."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def field(self, value: bytes) -> Self:
        """Appends bytes with their length in front."""
        self._parts.append(len(value).to_bytes(LENGTH_BYTES, "big"))
        self._parts.append(value)
        return self

    def text(self, value: str) -> Self:
        """Appends UTF-8 text with its length in bytes in front."""
        return self.field(value.encode())

    def number(self, value: int) -> Self:
        """Appends an unsigned 64-bit number, length-prefixed like every other field."""
        return self.field(value.to_bytes(NUMBER_BYTES, "big"))

    def done(self) -> bytes:
        """Returns the message."""
        return b"".join(self._parts)


class Reader:
    """Takes a message apart; every read can raise `MalformedMessage`, and `end` raises it when bytes are left."""

    def __init__(self, data: bytes, what: str, *, limit: int = MAX_BODY_BYTES) -> None:
        if len(data) > limit:
            raise MalformedMessage(f"message={what} has {len(data)} bytes; at most {limit} are read; drop its sender")
        self._data = data
        self._what = what
        self._at = 0

    def field(self, *, limit: int = MAX_BODY_BYTES, exactly: int | None = None) -> bytes:
        """Returns the next field, of at most `limit` bytes, or of `exactly` the given number."""
        size = int.from_bytes(self._take(LENGTH_BYTES), "big")
        if size > limit or (exactly is not None and size != exactly):
            allowed = f"at most {limit}" if exactly is None else f"{exactly}"
            raise MalformedMessage(f"message={self._what} has a field of {size} bytes; {allowed} belong there")
        return self._take(size)

    def text(self, *, limit: int = MAX_SITE_BYTES) -> str:
        """Returns the next field as UTF-8 text."""
        try:
            return self.field(limit=limit).decode()
        except UnicodeDecodeError as error:
            raise MalformedMessage(f"message={self._what} has a name that is not UTF-8; drop its sender") from error

    def number(self) -> int:
        """Returns the next field as an unsigned 64-bit number."""
        return int.from_bytes(self.field(exactly=NUMBER_BYTES), "big")

    def more(self) -> bool:
        """Returns whether bytes are left."""
        return self._at < len(self._data)

    def end(self) -> None:
        """Refuses trailing bytes, which a second parser could read differently."""
        if self.more():
            raise MalformedMessage(f"message={self._what} has bytes after its end; drop its sender")

    def _take(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        if len(piece) != size:
            raise MalformedMessage(f"message={self._what} ends too early; send it again whole")
        self._at += size
        return piece
