"""Whether a compressed image is whole: a copy that stopped may have its full length, with zeros for the rest.

PIL refuses a file that is too short. Of zeros it makes grey or smeared pixels, without a word.
"""

from collections.abc import Callable

_SCAN, _END = 0xDA, b"\xff\xd9"  # markers of JPEG: the start of the values, and the end of the image
ZEROS = 32  # bytes at the end of a WebP's values, which has no marker; no coder of its two kinds ends in so many zeros


def is_whole(content: bytes, form: str) -> bool:
    """Says whether an image's end is in a file.

    Args:
      content: content of the file.
      form: PIL's name of the format; a format whose end PIL itself checks is whole here.
    """
    check = _CHECKS.get(form)
    return check is None or check(content)


def _jpeg(content: bytes) -> bool:
    """Says whether the marker of the end follows the start of the values; a thumbnail in front has its own end."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != _SCAN:
        filling = content[at + 1] == 0xFF
        at += 1 if filling else 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return content.find(_END, at) >= 0


def _png(content: bytes) -> bool:
    return b"IEND" in content


def _webp(content: bytes) -> bool:
    at = 12
    while at + 8 <= len(content):
        name, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        if name in (b"VP8 ", b"VP8L"):
            return size < ZEROS or any(content[at + 8 : at + 8 + size][-ZEROS:])
        at += 8 + size + size % 2
    return True


_CHECKS: dict[str, Callable[[bytes], bool]] = {"JPEG": _jpeg, "MPO": _jpeg, "PNG": _png, "WEBP": _webp}
