"""Encodes texts as examples of one length."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from offsite.errors import ConfigError, DataError, lookup
from offsite.task.examples import Examples

SHORTEST = 2  # tokens; a shorter record has no next token to predict
JOINED = "joined"  # key of the split for public texts alone, see `PUBLIC_SPLITS`


def encode(tokenizer: Any, texts: Sequence[str], *, length: int, split: str, may_be_none: bool = False) -> Examples:
    """Returns texts as examples of one length.

    Args:
      tokenizer: a `task.tokenizer.Tokenizer`; see `Frame` for the tokens around each text.
      texts: documents, or records.
      length: tokens of each example, >= 2.
      split: key of `PUBLIC_SPLITS`. "truncate" makes one example from each text, cut or padded on the right, whatever
        the tokenizer returns; a text without tokens, or of one token with none in front, is an example without a
        target. "blocks" cuts each text into examples of exactly `length` tokens and drops the remainder, and a shorter
        text is one padded example; so the number of a text's examples depends on the tokenizer, and no text touches the
        examples of another. Every block begins with the tokenizer's own beginning, since a model reads each block
        alone. "joined" joins all texts before the cut, so a text moves the cuts of all texts behind it.
      may_be_none: whether no example is a result, as at a site, where an error would tell what the tokenizer met.

    Raises:
      ConfigError: the length is too small.
      UnknownName: there is no such split.
      DataError: there is no example.
    """
    frame, cut = Frame.of(tokenizer), lookup(PUBLIC_SPLITS, split, "split")
    check_length(length - len(frame.start) - len(frame.end))
    rows = cut(tokenizer.tokens(texts, length if split == "truncate" else None), frame, length)
    if not rows and not may_be_none:
        raise DataError(f"examples=0 from {len(texts)} texts at length={length}; give more text or lower the length")
    # Padding is never a target, and a causal model never sees padding on the right, so any valid id will do.
    return Examples(padded(rows, length), mask_of(rows, length))


def padded(rows: Sequence[Sequence[int]], width: int, value: int = 0) -> torch.Tensor:
    """Returns rows of at most `width` numbers as int64 (n, width), padded on the right with `value`."""
    table = torch.full((len(rows), width), value, dtype=torch.long)
    for row, numbers in zip(table, rows, strict=True):
        row[: len(numbers)] = torch.tensor(numbers, dtype=torch.long)
    return table


def mask_of(rows: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """Returns 1 for each number of `padded` and 0 for its padding, int64 (n, width)."""
    return (torch.arange(width)[None, :] < torch.tensor([len(row) for row in rows], dtype=torch.long)[:, None]).long()


@dataclass(frozen=True)
class Frame:
    """The tokens around each text of a causal language model.

    They are those of the tokenizer's own rule (its post-processor), as in transformers. Beyond that rule, a whole text
    ends with the end-of-text token, so that the model learns where to stop. No token is doubled: a text that already
    begins or ends with these tokens, because a person wrote them, keeps its own.

    Attributes:
      start: ids in front of a text, such as the beginning-of-text token.
      end: ids behind a text by the tokenizer's own rule.
      stop: the end-of-text token in a list; empty where `end` has it, or where there is no such token.
    """

    start: list[int]
    end: list[int]
    stop: list[int]

    @classmethod
    def of(cls, tokenizer: Any) -> "Frame":
        """Returns the tokens that a `task.tokenizer.Tokenizer` puts around a text."""
        eos = tokenizer.eos_token_id
        return cls(tokenizer.start, tokenizer.end, [] if eos is None or eos in tokenizer.end else [int(eos)])

    def begun(self, tokens: list[int]) -> list[int]:
        """Returns a text's tokens with their beginning."""
        return tokens if tokens[: len(self.start)] == self.start else self.start + tokens

    def ended(self, tokens: list[int]) -> list[int]:
        """Returns a whole text's tokens with their end."""
        last = self.end + self.stop
        return tokens if last and tokens[-len(last) :] == last else tokens + last

    def bare(self, tokens: list[int]) -> list[int]:
        """Returns a text's tokens without a beginning that the text brings itself."""
        return tokens[len(self.start) :] if self.start and tokens[: len(self.start)] == self.start else tokens


def check_length(length: int) -> None:
    """Refuses examples without room for a target.

    Raises:
      ConfigError: the length is below 2 tokens.
    """
    if length < SHORTEST:
        raise ConfigError(f"length={length} must be at least {SHORTEST} tokens; 128 is usual")


def _blocks(documents: list[list[int]], frame: Frame, length: int) -> list[list[int]]:
    room = length - len(frame.start)
    return [
        frame.start + piece
        for tokens in documents
        for piece in _cut(frame.ended(frame.bare(tokens)) if tokens else [], room)
    ]


def _cut(tokens: list[int], length: int) -> list[list[int]]:
    """Returns a text's full blocks; a text shorter than a block is one block."""
    return [tokens[at : at + length] for at in range(0, max(len(tokens) - length, 0) + 1, length)]


def _joined(documents: list[list[int]], frame: Frame, length: int) -> list[list[int]]:
    whole = (frame.ended(frame.bare(tokens)) for tokens in documents if tokens)
    stream, room = list(itertools.chain.from_iterable(whole)), length - len(frame.start)
    return [frame.start + stream[at : at + room] for at in range(0, len(stream) - room + 1, room)]


def _truncate(documents: list[list[int]], frame: Frame, length: int) -> list[list[int]]:
    return [_row(frame.begun(tokens), frame, length) if tokens else [] for tokens in documents]


def _row(tokens: list[int], frame: Frame, length: int) -> list[int]:
    """Returns one example: a text that is cut keeps the end of the tokenizer's own rule, as in transformers."""
    if len(tokens) < SHORTEST:
        return []
    if len(tokens) + len(frame.end) > length:
        return tokens[: length - len(frame.end)] + frame.end
    return frame.ended(tokens)[:length]


_Cut = Callable[[list[list[int]], Frame, int], list[list[int]]]
SPLITS: dict[str, _Cut] = {"blocks": _blocks, "truncate": _truncate}  # the splits that a job may have
# Splits of public texts; under "joined" records would share state, so no job may have it.
PUBLIC_SPLITS: dict[str, _Cut] = {**SPLITS, JOINED: _joined}
