"""Causal language modelling: predict each next token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from task import checkpoint
from task.encode import encode
from task.examples import Examples


class CausalLM:
    """The task of any causal language model of transformers."""

    name = "causal_lm"

    def load(self, path: Path | str, *, dtype: torch.dtype) -> Any:
        """Returns the model of a directory; see `task.checkpoint.load_causal`."""
        return checkpoint.load_causal(path, dtype=dtype)

    def load_tokenizer(self, path: Path | str) -> Any:
        """Returns the tokenizer of a directory; see `task.checkpoint.load_tokenizer`."""
        return checkpoint.load_tokenizer(path)

    def encode(self, tokenizer: Any, texts: Sequence[str], *, length: int, split: str) -> Examples:
        """Returns texts as examples; see `task.encode.encode`."""
        return encode(tokenizer, texts, length=length, split=split)

    def losses(self, model: nn.Module, examples: Examples) -> torch.Tensor:
        """Returns each example's mean negative log-likelihood per target token, nats, float32 (B,), differentiable.

        The mean is over that example's own targets, so no example weighs on another. `outputs.loss` of transformers is
        a mean over all tokens of the batch, from which no per-example gradient follows.
        """
        sums, counts = _sums(model, examples)
        return sums / counts.clamp(min=1)

    def token_losses(self, model: nn.Module, examples: Examples) -> tuple[float, int]:
        """Returns the sum of negative log-likelihoods in nats over all targets, and their count, without gradients."""
        with torch.no_grad():
            sums, counts = _sums(model, examples)
        return float(sums.double().sum()), int(counts.sum())


def _sums(model: nn.Module, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns per example the sum of its targets' losses, float32 (B,), and their number, int64 (B,).

    The model gets no attention mask: padding is on the right, where causal attention never looks from a valid token,
    and a mask would make transformers branch on its values, which `torch.func` cannot follow.
    """
    logits = model(input_ids=examples.input_ids).logits
    valid = examples.attention_mask[:, 1:]
    # One example at a time: a slice of one row is a view, and float32 copies of half-precision logits stay small.
    sums = [
        (_token_losses(row[:-1], ids[1:]) * keep).sum()
        for row, ids, keep in zip(logits, examples.input_ids, valid, strict=True)
    ]
    return torch.stack(sums) if sums else logits.new_zeros(0, dtype=torch.float32), valid.sum(dim=-1)


def _token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    losses: torch.Tensor = functional.cross_entropy(logits.float(), targets, reduction="none")
    return losses
