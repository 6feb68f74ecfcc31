"""From texts to examples."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from errors import ConfigError, DataError, lookup
from task.examples import Examples

SHORTEST = 2  # tokens; a shorter record has no target to predict


def encode(tokenizer: Any, texts: Sequence[str], *, length: int, split: str) -> Examples:
    """Returns texts as examples of one length.

    Args:
      tokenizer: a `task.tokenizer.Tokenizer`; its end-of-text token, where there is one, ends each text.
      texts: one document or record each.
      length: tokens per example, >= 2.
      split: "blocks" joins all texts and cuts consecutive blocks of exactly `length` tokens, dropping the remainder, so
        that the tokenizer has a say in how many there are; "truncate" makes one example of each text, cut or padded on
        the right, whatever the tokenizer makes of it: a text of fewer than 2 tokens is an example without a target.

    Raises:
      ConfigError: the length is too small.
      UnknownName: no such split.
      DataError: there is no example.
    """
    if length < SHORTEST:
        raise ConfigError(f"length={length} must be at least {SHORTEST} tokens; 128 is usual")
    cut = lookup(SPLITS, split, "split")
    rows = cut(tokenizer.tokens(texts), _end(tokenizer), length)
    if not rows:
        raise DataError(f"examples=0 from {len(texts)} texts at length={length}; give more text or a smaller length")
    widths = [len(row) for row in rows]
    # The pad value is never a target and, being on the right, never seen by a causal model: any valid id will do.
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    mask = (torch.arange(length)[None, :] < torch.tensor(widths)[:, None]).long()
    return Examples(ids, mask)


def _end(tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    return [] if eos is None else [int(eos)]


def _blocks(documents: list[list[int]], end: list[int], length: int) -> list[list[int]]:
    stream = list(itertools.chain.from_iterable(tokens + end for tokens in documents if tokens))
    return [stream[at : at + length] for at in range(0, len(stream) - length + 1, length)]


def _truncate(documents: list[list[int]], end: list[int], length: int) -> list[list[int]]:
    return [(tokens + end)[:length] if len(tokens) >= SHORTEST else [] for tokens in documents]


SPLITS: dict[str, Callable[[list[list[int]], list[int], int], list[list[int]]]] = {
    "blocks": _blocks,
    "truncate": _truncate,
}
