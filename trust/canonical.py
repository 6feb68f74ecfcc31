"""Canonical JSON for what people sign: one value has one encoding, and every field is checked before it is believed."""

import json
import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NoReturn

from offsite.errors import ConfigError, MalformedMessage

MAX_BYTES = 1 << 22
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_LINE, _LINES = re.compile(r"[ -~]*"), re.compile(r"[ -~\n]*")
_HEX = re.compile(r"(?:[0-9a-f]{2})*")
# A key that only one kind of file has -> the kind, and the way of such a file.
_OTHERS = {
    "csr": "a site's request; the coordinator takes it with offsite coordinator approve, and answers with a welcome",
    "certificate": "a welcome; the site that it is for takes it with offsite client sign",
    "members": "a federation manifest; it lies inside a welcome, which the coordinator sends to each site",
}
_RESERVED = ("coordinator",)  # the other party's name in every signed message


def dump(content: dict[str, Any]) -> bytes:
    """Returns the canonical encoding of an object: keys sorted, no spaces, ASCII, no NaN."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def load(data: bytes, what: str, keys: Iterable[str], *, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Reads an object that has exactly these keys and stands in its canonical encoding.

    Args:
      data: the encoded object, ASCII bytes.
      what: noun for the object in error messages.
      keys: names of all fields.
      limit: longest `data` that is read, bytes.

    Raises:
      MalformedMessage: the bytes are too long, no JSON, an object with other keys, or another encoding of the object;
        another kind of file that people send is named.
    """
    keys = set(keys)
    if len(data) > limit:
        raise MalformedMessage(f"{what} has {len(data)} bytes; at most {limit} are read; ask for it again")
    try:
        content = json.loads(data.decode("ascii"))
        canonical = isinstance(content, dict) and dump(content) == data
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"{what} does not parse ({type(error).__name__}); ask for it again") from error
    if not canonical:
        raise MalformedMessage(f"{what} is not in canonical form; was it altered on the way? ask for it again")
    if content.keys() != keys:
        for key, other in _OTHERS.items():
            if key in content and key not in keys:
                raise MalformedMessage(f"a {what} is needed here, and this file is {other}")
        raise MalformedMessage(f"{what} has other fields than this release knows; install the same release everywhere")
    return dict(content)


def text(value: object, what: str, *, limit: int = 1 << 16, lines: bool = False) -> str:
    """Returns a text of printable ASCII characters, which a terminal shows as they are.

    Args:
      value: the field as it was read.
      what: noun for the field in error messages.
      limit: most characters.
      lines: whether line breaks are allowed.

    Raises:
      MalformedMessage: the value is no such text.
    """
    if not isinstance(value, str) or len(value) > limit or not (_LINES if lines else _LINE).fullmatch(value):
        _refuse(what, f"a printable ASCII text of at most {limit} characters")
    return value


def hexadecimal(value: object, what: str, *, size: int | None = None) -> str:
    """Returns lower-case hexadecimal digits.

    Args:
      value: the field as it was read.
      what: noun for the field in error messages.
      size: number of bytes that the digits stand for; None allows any.

    Raises:
      MalformedMessage: the value is something else.
    """
    if not isinstance(value, str) or not _HEX.fullmatch(value) or (size is not None and len(value) != 2 * size):
        _refuse(what, "lower-case hexadecimal" + (f" of {size} bytes" if size is not None else ""))
    return value


def whole(value: object, what: str, *, lowest: int, highest: int) -> int:
    """Returns a whole number in [lowest, highest].

    Raises:
      MalformedMessage: the value is something else.
    """
    if type(value) is not int or not lowest <= value <= highest:
        _refuse(what, f"a whole number from {lowest} to {highest}")
    return value


def positive(value: object, what: str) -> float:
    """Returns a finite number above 0.

    Raises:
      MalformedMessage: the value is something else.
    """
    if type(value) is not float or not (math.isfinite(value) and value > 0):
        _refuse(what, "a finite number above 0")
    return value


def real(value: object, what: str, *, lowest: float, highest: float) -> float:
    """Returns a number in [lowest, highest] that was written with a point or an exponent.

    Raises:
      MalformedMessage: the value is something else.
    """
    if type(value) is not float or not lowest <= value <= highest:
        _refuse(what, f"a number from {lowest:g} to {highest:g}")
    return value


def check_name(name: object, what: str) -> str:
    """Returns a name that can stand in a path, a certificate and a signed message.

    Raises:
      ConfigError: the name cannot.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() in _RESERVED:
        raise ConfigError(
            f"{what}={name!r}: must be 1 to 63 ASCII letters, digits, - and _, beginning with a letter or digit, "
            f"and not be {' or '.join(_RESERVED)}; choose another"
        )
    return name


def stamp(now: datetime) -> str:
    """Returns a moment as it stands in a signed file: UTC, whole seconds.

    Raises:
      ConfigError: the moment has no time zone.
    """
    if now.tzinfo is None:
        raise ConfigError(f"now={now.isoformat()}: a moment needs its time zone; use UTC")
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(value: object, what: str) -> datetime:
    """Returns the moment that `stamp` wrote.

    Raises:
      MalformedMessage: `stamp` does not write such a value.
    """
    try:
        read = datetime.strptime(str(value), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        _refuse(what, "a UTC time like 2026-01-31T12:00:00Z")
    if value != stamp(read):
        _refuse(what, "a UTC time like 2026-01-31T12:00:00Z")
    return read


def _refuse(what: str, rule: str) -> NoReturn:
    raise MalformedMessage(f"{what}: must be {rule}; ask its sender for it again")
