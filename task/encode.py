"""Encodes texts as examples of one length."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from offsite.errors import ConfigError, DataError, lookup
from offsite.task.examples import Examples

SHORTEST = 2  # tokens; a shorter record has no next token to predict
JOINED = "joined"  # key of the split for public texts alone, see `PUBLIC_SPLITS`


def encode(tokenizer: Any, texts: Sequence[str], *, length: int, split: str, may_be_none: bool = False) -> Examples:
    """Returns texts as examples of one length.

    Args:
      tokenizer: a `task.tokenizer.Tokenizer`; its end-of-text token, where it has one, ends each text.
      texts: documents, or records.
      length: tokens of each example, >= 2.
      split: key of `PUBLIC_SPLITS`. "truncate" makes one example from each text, cut or padded on the right, whatever
        the tokenizer returns; a text of fewer than 2 tokens is an example without a target. "blocks" cuts each text
        into examples of exactly `length` tokens and drops the remainder, and a shorter text is one padded example; so
        the number of a text's examples depends on the tokenizer, and no text touches the examples of another. "joined"
        joins all texts before the cut, so a text moves the cuts of all texts behind it.
      may_be_none: whether no example is a result, as at a site, where an error would tell what the tokenizer met.

    Raises:
      ConfigError: the length is too small.
      UnknownName: there is no such split.
      DataError: there is no example.
    """
    check_length(length)
    cut = lookup(PUBLIC_SPLITS, split, "split")
    rows = cut(tokenizer.tokens(texts, length if split == "truncate" else None), end_of(tokenizer), length)
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


def end_of(tokenizer: Any) -> list[int]:
    """Returns the end-of-text token in a list; an empty list where the tokenizer has no such token."""
    eos = tokenizer.eos_token_id
    return [] if eos is None else [int(eos)]


def check_length(length: int) -> None:
    """Refuses examples without room for a target.

    Raises:
      ConfigError: the length is below 2 tokens.
    """
    if length < SHORTEST:
        raise ConfigError(f"length={length} must be at least {SHORTEST} tokens; 128 is usual")


def _blocks(documents: list[list[int]], end: list[int], length: int) -> list[list[int]]:
    return [block for tokens in documents for block in _cut(tokens + end if tokens else [], length)]


def _cut(tokens: list[int], length: int) -> list[list[int]]:
    """Returns a text's full blocks; a text shorter than a block is one block."""
    return [tokens[at : at + length] for at in range(0, max(len(tokens) - length, 0) + 1, length)]


def _joined(documents: list[list[int]], end: list[int], length: int) -> list[list[int]]:
    stream = list(itertools.chain.from_iterable(tokens + end for tokens in documents if tokens))
    return [stream[at : at + length] for at in range(0, len(stream) - length + 1, length)]


def _truncate(documents: list[list[int]], end: list[int], length: int) -> list[list[int]]:
    return [(tokens + end)[:length] if len(tokens) >= SHORTEST else [] for tokens in documents]


_Cut = Callable[[list[list[int]], list[int], int], list[list[int]]]
SPLITS: dict[str, _Cut] = {"blocks": _blocks, "truncate": _truncate}  # the splits that a job may have
# Splits of public texts; under "joined" records would share state, so no job may have it.
PUBLIC_SPLITS: dict[str, _Cut] = {**SPLITS, JOINED: _joined}
