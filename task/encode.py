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
      tokenizer: a Hugging Face tokenizer; its eos token, where there is one, ends each text.
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
    rows = cut([_tokens(tokenizer, text) for text in texts], _end(tokenizer), length)
    if not rows:
        raise DataError(f"examples=0 from {len(texts)} texts at length={length}; give more text or a smaller length")
    widths = [len(row) for row in rows]
    # The pad value is never a target and, being on the right, never seen by a causal model: any valid id will do.
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.long)
    mask = (torch.arange(length)[None, :] < torch.tensor(widths)[:, None]).long()
    return Examples(ids, mask)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    """Returns a text's token ids without special tokens, none where the tokenizer fails on it.

    A tokenizer that comes from elsewhere must not say by a fault what it met in a record. `verbose=False` since a long
    text is no mistake here.
    """
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:  # a panic of its Rust code is no Exception
        return []
    return ids


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
