"""A message of Flower's from its pieces: counted before it is put together, since nothing of it is signed yet.

Flower moves a message as objects under their SHA-256, and an array names its pieces. Flower itself puts together
whatever is named: a message of 1 MB whose array names one piece 500 times takes 500 MB.
"""

import json
from collections.abc import Callable, Iterator
from itertools import islice

from flwr.app import Array, Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from offsite.errors import MalformedMessage

PIECE, SPARE_PIECES = 1 << 20, 16  # Flower moves a message in pieces of 1 to 5 MiB, and a few small ones around them
# Flower writes the names of all pieces in one transaction: 1000 take seconds, in which its database refuses others.
# So a long message has longer pieces and not more of them, as far as a piece may go.
MOST_PIECES, LONGEST_PIECE = 512, 4 << 20
VALUE_BYTES, OTHER_BYTES = 4, 8 << 20  # of a message: an entry of an adapter or update; manifest, keys and signatures


def piece_of(size: int) -> int:
    """Returns the bytes of each piece but the last of a message of so many bytes."""
    return min(max(PIECE, -(-size // MOST_PIECES)), LONGEST_PIECE)


def pieces_of(size: int) -> int:
    """Returns the number of pieces of a message of so many bytes."""
    return -(-size // piece_of(size))


class Incoming:
    """A message on its way: the pieces that have arrived and the pieces that are still missing.

    Args:
      name: id of the message.
      tree: ids of the message's pieces, as they were announced.
      largest: bytes of the longest honest message.
    """

    def __init__(self, name: str, tree: ObjectTree, largest: int) -> None:
        self.name, self._tree = name, tree
        self._pieces, self._limit = pieces_of(largest) + SPARE_PIECES, largest + SPARE_PIECES * PIECE
        self._contents: dict[str, bytes] = {}
        self._bytes = 0

    def collect(self, pull: Callable[[str], bytes]) -> None:
        """Pulls the pieces that are missing; a later call goes on where an error ended this one.

        Args:
          pull: function from the id of a piece to its content; its exceptions pass.

        Raises:
          MalformedMessage: the message has too many pieces, or too many bytes.
        """
        if len(list(islice(iterate_object_tree(self._tree), self._pieces + 1))) > self._pieces:
            raise MalformedMessage(f"pieces={self._pieces + 1} or more: at most {self._pieces} make a message here")
        for piece in self._missing():
            content = pull(piece)
            self._bytes += len(content)
            if self._bytes > self._limit:
                raise MalformedMessage(f"bytes={self._bytes} or more: at most {self._limit} make a message here")
            self._contents[piece] = content

    def message(self) -> Message:
        """Returns the message, once all pieces have been collected.

        Raises:
          MalformedMessage: the message would take too many bytes when put together, or is another object. Pieces that
            Flower did not write raise Flower's own exceptions.
        """
        check_size(self._contents, self._limit)
        message = inflate_object_from_contents(self.name, self._contents)
        if not isinstance(message, Message):
            raise MalformedMessage(f"object={type(message).__name__}: a message was announced")
        message.metadata.__dict__["_message_id"] = self.name
        return message

    def _missing(self) -> Iterator[str]:
        for piece in iterate_object_tree(self._tree):
            if piece.object_id not in self._contents:
                yield piece.object_id


def check_size(contents: dict[str, bytes], limit: int) -> None:
    """Refuses pieces that would take too much memory when put together, since an array may name one piece many times.

    Args:
      contents: piece by id.
      limit: most bytes of a message.

    Raises:
      MalformedMessage: the pieces, counted by themselves and in their arrays, have more than twice `limit` bytes.
    """
    total = sum(map(len, contents.values()))
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            named = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            total += sum(len(contents[children[index]]) for index in named)
    if total > 2 * limit:  # each piece counts by itself and in its array
        raise MalformedMessage(f"bytes={total}: at most {2 * limit} make a message here")
