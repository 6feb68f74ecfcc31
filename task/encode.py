"""Encodes texts as examples of one length."""

from collections.abc import Sequence
from typing import Any

import torch

from offsite.task.examples import Examples
from offsite.task.token_rows import text_rows


def encode(tokenizer: Any, texts: Sequence[str], *, length: int, split: str, may_be_none: bool = False) -> Examples:
    """Returns texts as examples of one length.

    Args:
      tokenizer: a `task.tokenizer.Tokenizer`; see `task.splits.Frame` for the tokens around each text.
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
    rows = text_rows(tokenizer, texts, length=length, split=split, may_be_none=may_be_none)
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
