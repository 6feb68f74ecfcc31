"""Causal language modelling: predict each next token."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional

from offsite.task import checkpoint, chunked_head
from offsite.task.device import device_of
from offsite.task.encode import encode
from offsite.task.examples import Examples, vocabulary_of
from offsite.task.record_fields import FIELDS
from offsite.task.records import LenientRecords
from offsite.task.spec import Record, Tally

log = logging.getLogger("offsite.task")


class CausalLM:
    """The task of any causal language model of transformers.

    Args:
      chunk: number of tokens whose logits exist at the same time where the model allows chunks, >= 1; None computes the
        logits of a whole batch at once.
    """

    name: ClassVar[str] = "causal_lm"
    kind: ClassVar[str] = "causal_lm"
    columns: ClassVar[Mapping[str, type]] = FIELDS["causal_lm"]

    def __init__(self, chunk: int | None = chunked_head.CHUNK) -> None:
        self._chunk = chunk
        # The obstacle that a trial of each model found, and the obstacle last logged; entries live as long as the
        # model.
        self._tried: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._logged: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type["CausalLM"], tuple[int | None]]:
        # Without the dictionaries: a worker process has models of its own.
        return type(self), (self._chunk,)

    def load(self, path: Path | str, *, dtype: torch.dtype) -> Any:
        """Returns the model of a directory; see `task.checkpoint.load`."""
        return checkpoint.load(path, dtype=dtype, kind=self.kind)

    def load_processor(self, path: Path | str) -> Any:
        """Returns the tokenizer of a directory; see `task.checkpoint.load_tokenizer`."""
        return checkpoint.load_tokenizer(path)

    def encode(
        self, processor: Any, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> Examples:
        """Returns texts as examples; see `task.encode.encode`."""
        texts, lenient = [record["text"] for record in records], isinstance(records, LenientRecords)
        return encode(processor, texts, length=length, split=split, may_be_none=lenient)

    def losses(self, model: nn.Module, batch: Examples) -> torch.Tensor:
        """Returns each example's mean negative log-likelihood per target token, nats, float32 (B,), differentiable.

        The mean is over the example's own targets, so no example influences another. `outputs.loss` of transformers is
        a mean over all tokens of the batch, from which no per-example gradient follows. The losses are differentiable
        only once where `obstacle` returns "".
        """
        sums, counts = self._sums(model, batch)
        return (sums / counts.clamp(min=1)).float()

    def tally(self, model: nn.Module, batch: Examples) -> Tally:
        """Returns the sum of the negative log-likelihoods of all targets, nats, without gradients."""
        with torch.no_grad():
            sums, counts = self._sums(model, batch)
        loss, targets = float(sums.double().sum()), int(counts.sum())
        return Tally(loss, targets, {"perplexity": (loss, targets)})

    def run(self, model: nn.Module, batch: Examples) -> None:
        """Calls a model once with examples, so that hooks see the activations; see `task.chunked_head.run`."""
        batch = batch.to(device_of(model))
        chunked_head.run(model, batch.input_ids)

    def dummy_batch(self, model: nn.Module, length: int, *, seed: int) -> Examples:
        """Returns two random records; see `Examples.dummy_batch`."""
        return Examples.dummy_batch(vocabulary_of(model), length, seed=seed)

    def obstacle(self, model: nn.Module, device: torch.device | str = "cpu") -> str:
        """Returns why the losses of a model need the logits of a whole batch at once, or "" where chunks are possible.

        A trial on dummy tokens shows once for each model what the model does with its logits. Whether the head is
        trained is checked at every call.

        Args:
          model: any causal language model.
          device: device of the model's inputs.
        """
        if self._chunk is None:
            return "chunk=None"
        if reason := chunked_head.obstacle(model):
            return reason
        if model not in self._tried:
            self._tried[model] = chunked_head.aftermath(model, torch.device(device))
        return self._tried[model]

    def _sums(self, model: nn.Module, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns for each example the sum of its targets' losses, (B,), and the number of targets, int64 (B,).

        The model gets no attention mask. Padding is on the right, where causal attention of a valid token never looks,
        and a mask would make transformers branch on the mask's values, which `torch.func` cannot follow.
        """
        examples = examples.to(device_of(model))
        obstacle = self.obstacle(model, examples.input_ids.device)
        if self._logged.get(model, "") != obstacle:
            self._logged[model] = obstacle
            log.info("logits of a whole batch are held at once: %s", obstacle or "no longer")
        if obstacle or self._chunk is None:
            return _whole(model, examples), examples.targets
        return _by_chunks(model, examples, self._chunk), examples.targets


def _by_chunks(model: nn.Module, examples: Examples, chunk: int) -> torch.Tensor:
    """Returns the sums of a model whose logits are its frozen head's output; the head gets only scored positions.

    One example at a time: in a product over the positions of a whole batch, the number of another example's targets
    would decide how an example's own logits are rounded.
    """
    last = chunked_head.head_of(model)
    weight = chunked_head.weight_of(last)
    hidden = chunked_head.hidden_states(model, examples.input_ids)[:, :-1]
    rows = zip(hidden, examples.input_ids[:, 1:], examples.predicted.bool(), strict=True)
    losses = [
        chunked_head.TokenLosses.apply(states[keep], ids[keep], weight, last.bias, chunk) for states, ids, keep in rows
    ]
    if not losses:
        return hidden.new_zeros(0, dtype=chunked_head.wide(hidden.dtype))
    return torch.stack([own.sum() for own in losses])


def _whole(model: nn.Module, examples: Examples) -> torch.Tensor:
    """Returns the sums of any model from its logits."""
    logits = model(input_ids=examples.input_ids).logits
    valid = examples.predicted
    # One example at a time: a row is a view, and float32 copies of half-precision logits stay small.
    sums = [
        (_token_losses(row[:-1], ids[1:]) * keep).sum()
        for row, ids, keep in zip(logits, examples.input_ids, valid, strict=True)
    ]
    return torch.stack(sums) if sums else logits.new_zeros(0, dtype=chunked_head.wide(logits.dtype))


def _token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    losses: torch.Tensor = functional.cross_entropy(
        logits.to(chunked_head.wide(logits.dtype)), targets, reduction="none"
    )
    return losses
