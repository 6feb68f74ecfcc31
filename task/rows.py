"""Batches for models with several named inputs: the inputs and the scored labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from offsite.errors import DataError
from offsite.task.examples import all_but
from offsite.task.labels import IGNORED


@dataclass(frozen=True)
class RowBatch:
    """Examples as a model's keyword arguments; each row is one record.

    Attributes:
      inputs: name of a model's argument -> tensor (n, ...).
      labels: numbers of labels, int64 (n, ...), `IGNORED` where nothing is scored.
      aside: name -> tensor (n, ...) that the scores need and the model does not get.
      sources: what the scores need of each row beside tensors, one object for each row; None for an emptied row, and
        nothing at all for a task whose scores need tensors only.
    """

    inputs: Mapping[str, torch.Tensor]
    labels: torch.Tensor
    aside: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sources: Sequence[Any] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Refuses tensors with different numbers of rows."""
        counts = {name: len(tensor) for name, tensor in {**self.inputs, **self.aside}.items()}
        for name, count in (counts | ({"sources": len(self.sources)} if self.sources else {})).items():
            if count != len(self.labels):
                raise DataError(f"{name} rows={count}, labels rows={len(self.labels)}: must be equal; encode again")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def targets(self) -> torch.Tensor:
        """Number of scored labels of each row, int64 (n,)."""
        return _flat(self.labels != IGNORED).sum(dim=1)

    def select(self, indices: Any) -> "RowBatch":
        """Returns the rows at integer indices, in that order; a sequence, an array or a tensor, which may be empty."""
        rows = torch.as_tensor(indices, dtype=torch.long, device=self.labels.device).reshape(-1)
        sources = tuple(self.sources[row] for row in rows.tolist()) if self.sources else ()
        return self._each(lambda tensor: tensor[rows], sources)

    def to(self, device: torch.device | str) -> "RowBatch":
        """Returns the examples on a device."""
        return self._each(lambda tensor: tensor.to(device), self.sources)

    def within(self, model: nn.Module) -> "RowBatch":
        """Returns the examples; an example with an id that the model does not know is emptied."""
        config: Any = model.config
        vocabulary = int(config.get_text_config().vocab_size)
        limits = {
            "input_ids": vocabulary,
            "decoder_input_ids": vocabulary,
            "token_type_ids": int(getattr(config, "type_vocab_size", None) or 1),
        }
        fits = torch.ones(len(self), dtype=torch.bool, device=self.labels.device)
        for name, most in limits.items():
            if name in self.inputs:
                fits &= _flat((self.inputs[name] >= 0) & (self.inputs[name] < most)).all(dim=1)
        if "decoder_input_ids" in self.inputs:  # here the labels are tokens as well
            fits &= _flat((self.labels == IGNORED) | (self.labels < vocabulary)).all(dim=1)
        return self if bool(fits.all()) else self._kept(fits)

    def emptied(self, rows: Sequence[int]) -> "RowBatch":
        """Returns the examples; those at the indices `rows` hold zeros and have no label."""
        return self._kept(all_but(rows, len(self), self.labels.device))

    def _kept(self, fits: torch.Tensor) -> "RowBatch":
        def kept(tensor: torch.Tensor, empty: int) -> torch.Tensor:
            return torch.where(fits.reshape(-1, *[1] * (tensor.ndim - 1)), tensor, torch.full_like(tensor, empty))

        inputs = {name: kept(tensor, 0) for name, tensor in self.inputs.items()}
        if "attention_mask" in inputs:
            inputs["attention_mask"] = attended(inputs["attention_mask"])
        aside = {name: kept(tensor, 0) for name, tensor in self.aside.items()}
        sources = tuple(source if fit else None for source, fit in zip(self.sources, fits.tolist(), strict=False))
        return RowBatch(inputs, kept(self.labels, IGNORED), aside, sources)

    def _each(self, change: Any, sources: Sequence[Any]) -> "RowBatch":
        inputs = {name: change(tensor) for name, tensor in self.inputs.items()}
        aside = {name: change(tensor) for name, tensor in self.aside.items()}
        return RowBatch(inputs, change(self.labels), aside, sources)


def _flat(values: torch.Tensor) -> torch.Tensor:
    """Returns values of shape (n, ...) as (n, m), also for n = 0."""
    return values[:, None] if values.ndim == 1 else values.flatten(1)


def attended(mask: torch.Tensor) -> torch.Tensor:
    """Returns an attention mask, int64 (n, T), in which the first place of every row is visible.

    Some attention kernels compute 0 / 0 for a row without a visible place, and the NaN spreads to other values.
    """
    mask = mask.clone()
    mask[:, 0] = 1
    return mask
