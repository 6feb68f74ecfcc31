"""The base of all text tasks with labels: loading, calling, and losses from sums over each example's own targets."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.errors import ConfigError, DataError, UnsupportedModel
from offsite.task import checkpoint
from offsite.task.chunked_head import wide
from offsite.task.device import device_of
from offsite.task.encode import mask_of, padded
from offsite.task.examples import vocabulary_of
from offsite.task.labels import IGNORED
from offsite.task.rows import RowBatch, attended
from offsite.task.tokenizer import Encoding

SHORTEST = 4  # tokens: special tokens at both ends, and some text between them


class Labelled(ABC):
    """A task whose models get named inputs; a subclass defines the fields, the encoding and the scores."""

    name: ClassVar[str]
    kind: ClassVar[str]
    columns: ClassVar[Mapping[str, type]]

    def load(self, path: Path | str, *, dtype: torch.dtype) -> Any:
        """Returns the model of a directory; see `task.checkpoint.load`."""
        return checkpoint.load(path, dtype=dtype, kind=self.kind)

    def load_processor(self, path: Path | str) -> Any:
        """Returns the tokenizer of a directory; see `task.checkpoint.load_tokenizer`."""
        return checkpoint.load_tokenizer(path)

    def losses(self, model: nn.Module, batch: RowBatch) -> Tensor:
        """Returns each example's mean cross-entropy over its own targets, nats, float32 (B,), differentiable."""
        batch = batch.to(device_of(model))
        return (self.sums(model, batch) / batch.targets.clamp(min=1)).float()

    def run(self, model: nn.Module, batch: RowBatch) -> None:
        """Calls a model once with examples, without gradients, so that hooks see the activations."""
        batch = batch.to(device_of(model))
        with torch.no_grad():
            model(**batch.inputs)

    @abstractmethod
    def sums(self, model: nn.Module, batch: RowBatch) -> Tensor:
        """Returns the sum of the losses of each example's targets, nats, (B,)."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss of each label, nats, in the shape of `labels`; 0 for `IGNORED`.

    Args:
      logits: scores of the classes, floating (..., classes).
      labels: numbers of labels, int64 (...).
    """
    flat = logits.reshape(-1, logits.shape[-1])
    losses = functional.cross_entropy(
        flat.to(wide(flat.dtype)), labels.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return losses.reshape(labels.shape)


def token_inputs(encodings: Sequence[Encoding], length: int, model_config: Any) -> dict[str, Tensor]:
    """Returns an encoder's inputs for texts: ids, mask, and segments if the model has any, each int64 (n, length).

    A text for which the tokenizer failed is a row of padding, of which one place stays visible to attention.

    Args:
      encodings: encoded texts from `task.tokenizer`.
      length: tokens of each example.
      model_config: configuration of the model.

    Raises:
      ConfigError: the length is too small; see `task.model_fit` for the number of the model's positions.
      DataError: there is no encoding.
      UnsupportedModel: the model has no padding token.
    """
    if length < SHORTEST:
        raise ConfigError(f"length={length}: must be at least {SHORTEST} tokens, since two tokens are special")
    if not encodings:
        raise DataError("examples=0 must be at least 1; give a file with records")
    rows = [encoding.ids for encoding in encodings]
    inputs = {
        "input_ids": padded(rows, length, padding_of(model_config)),
        "attention_mask": attended(mask_of(rows, length)),
    }
    if (getattr(model_config, "type_vocab_size", None) or 0) > 1:
        inputs["token_type_ids"] = padded([encoding.types for encoding in encodings], length)
    return inputs


def padding_of(model_config: Any) -> int:
    """Returns the id of a model's padding token.

    Raises:
      UnsupportedModel: the configuration names no padding token.
    """
    padding = getattr(model_config, "pad_token_id", None)
    if padding is None:
        raise UnsupportedModel("pad_token_id=None must be a number; write it into the model's config.json")
    return int(padding)


def dummy_inputs(model: nn.Module, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Returns an encoder's inputs for two random texts, one half as long as the other."""
    config: Any = model.config
    ids = torch.randint(vocabulary_of(model), (2, length), generator=generator)
    mask = (torch.arange(length)[None, :] < torch.tensor([[length], [max(length // 2, 2)]])).long()
    inputs = {"input_ids": torch.where(mask.bool(), ids, padding_of(config)), "attention_mask": mask}
    if (getattr(config, "type_vocab_size", None) or 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs
