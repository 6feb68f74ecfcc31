"""A file encrypted in chunks with constant memory, such that no chunk can be changed, moved, left out or added.

The STREAM construction of Hoang, Reyhanitabar, Rogaway and Vizár (CRYPTO 2015, section 7) over AES-256-GCM:
the nonce of chunk i is prefix || i || last, so a chunk opens only in its place, and the end only as the end.
"""

from secrets import token_bytes
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from offsite.errors import ConfigError, Untrusted

KEY_BYTES, PREFIX_BYTES, TAG_BYTES = 32, 7, 16
CHUNK_BYTES = 1 << 20
COPIES_TO_OPEN = 3  # the encrypted file, the decrypted stream and the files in it are on the disk at once
MAX_CHUNKS = 1 << 32


def encrypt(source: BinaryIO, target: BinaryIO, key: bytes) -> None:
    """Writes the encryption of `source`: 7 bytes of nonce prefix, then chunks of 1 MiB with a 16-byte tag each.

    Args:
      source: plaintext stream, read to its end.
      target: output stream, written from its current position.
      key: 32 bytes, fresh for this file.

    Raises:
      ConfigError: the key has another length, or the file has over 4 PiB.
    """
    cipher, prefix = _cipher(key), token_bytes(PREFIX_BYTES)
    target.write(prefix)
    number, chunk = 0, _read(source, CHUNK_BYTES)
    while True:
        following = _read(source, CHUNK_BYTES) if len(chunk) == CHUNK_BYTES else b""
        last = not following
        target.write(cipher.encrypt(_nonce(prefix, number, last=last), chunk, None))
        if last:
            return
        number, chunk = number + 1, following


def decrypt(source: BinaryIO, target: BinaryIO, key: bytes) -> None:
    """Writes the decryption of what `encrypt` wrote; every chunk is verified before it is written.

    Args:
      source: encrypted stream, read to its end.
      target: output stream, written from its current position.
      key: 32 bytes, as for `encrypt`.

    Raises:
      ConfigError: the key has another length.
      Untrusted: the stream was changed, cut off, reordered or lengthened; `target` is then incomplete, and the caller
        removes it.
    """
    cipher, prefix = _cipher(key), _read(source, PREFIX_BYTES)
    if len(prefix) != PREFIX_BYTES:
        raise Untrusted("an encrypted file ends in its first bytes; fetch it again")
    sealed_bytes = CHUNK_BYTES + TAG_BYTES
    number, chunk = 0, _read(source, sealed_bytes)
    while True:
        following = _read(source, sealed_bytes) if len(chunk) == sealed_bytes else b""
        last = not following
        try:
            plain = cipher.decrypt(_nonce(prefix, number, last=last), chunk, None)
        except (InvalidTag, ValueError) as error:
            raise Untrusted(
                f"chunk={number} of an encrypted file was changed, moved or cut off, or the key is another; "
                "fetch it again"
            ) from error
        if number > 0 and not plain:
            raise Untrusted(f"chunk={number} of an encrypted file is empty, which encrypt never writes; fetch it again")
        target.write(plain)
        if last:
            return
        number, chunk = number + 1, following


def _cipher(key: bytes) -> AESGCM:
    if len(key) != KEY_BYTES:
        raise ConfigError(f"key={len(key)} bytes; a file key has {KEY_BYTES}; create the package again")
    return AESGCM(key)


def _nonce(prefix: bytes, number: int, *, last: bool) -> bytes:
    if number >= MAX_CHUNKS:
        raise ConfigError(f"chunk={number}: a file has at most {MAX_CHUNKS} chunks; split it")
    return prefix + number.to_bytes(4, "big") + bytes([last])


def _read(source: BinaryIO, size: int) -> bytes:
    """Returns `size` bytes, fewer only at the end; a pipe or socket may hand out less at a time."""
    parts = []
    while size > 0 and (piece := source.read(size)):
        parts.append(piece)
        size -= len(piece)
    return parts[0] if len(parts) == 1 else b"".join(parts)
