"""What a kind of task has to provide."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from task.examples import Examples


class Task(Protocol):
    """One kind of model with its data: how it is loaded, encoded and scored."""

    name: str

    def load(self, path: Path | str, *, dtype: torch.dtype) -> Any:
        """Returns the model of a directory, in eval mode, from safetensors, without network or remote code."""

    def load_tokenizer(self, path: Path | str) -> Any:
        """Returns the tokenizer of a directory."""

    def encode(self, tokenizer: Any, texts: Sequence[str], *, length: int, split: str) -> Examples:
        """Returns the texts as examples of at most `length` tokens."""

    def losses(self, model: nn.Module, examples: Examples) -> torch.Tensor:
        """Returns one loss per example, float32 (B,), differentiable; no example may touch another's."""

    def token_losses(self, model: nn.Module, examples: Examples) -> tuple[float, int]:
        """Returns the sum of token losses in nats and their count, for evaluation."""

    def run(self, model: nn.Module, examples: Examples) -> None:
        """Calls a model exactly once with examples, without gradients, for what its blocks do with them."""
