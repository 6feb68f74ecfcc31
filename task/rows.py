"""Encoded examples of the models that get more than tokens: named inputs, and what is scored."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from offsite.errors import DataError
from offsite.task.labels import IGNORED


@dataclass(frozen=True)
class RowBatch:
    """Examples as a model's keyword arguments; one row is one record.

    Attributes:
      inputs: argument of the model -> (n, ...).
      labels: int64 (n, ...), `IGNORED` where nothing is scored.
      aside: what scoring needs and the model does not get, name -> (n, ...).
    """

    inputs: Mapping[str, torch.Tensor]
    labels: torch.Tensor
    aside: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses tensors of different numbers of rows."""
        for name, tensor in {**self.inputs, **self.aside}.items():
            if len(tensor) != len(self.labels):
                raise DataError(f"{name} rows={len(tensor)}, labels rows={len(self.labels)}: must agree; encode again")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def targets(self) -> torch.Tensor:
        """How many labels of each row are scored, int64 (n,)."""
        return _flat(self.labels != IGNORED).sum(dim=1)

    def select(self, indices: Any) -> "RowBatch":
        """Returns the rows at the indices, in that order; integers of any sequence, array or tensor, none too."""
        rows = torch.as_tensor(indices, dtype=torch.long, device=self.labels.device).reshape(-1)
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> "RowBatch":
        """Returns the examples on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def within(self, model: nn.Module) -> "RowBatch":
        """Returns the examples with those emptied whose ids the model does not know, on which it would fail."""
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
        if "decoder_input_ids" in self.inputs:  # what is learnt are tokens too
            fits &= _flat((self.labels == IGNORED) | (self.labels < vocabulary)).all(dim=1)
        return self if bool(fits.all()) else self._emptied(fits)

    def _emptied(self, fits: torch.Tensor) -> "RowBatch":
        def kept(tensor: torch.Tensor, empty: int) -> torch.Tensor:
            return torch.where(fits.reshape(-1, *[1] * (tensor.ndim - 1)), tensor, torch.full_like(tensor, empty))

        inputs = {name: kept(tensor, 0) for name, tensor in self.inputs.items()}
        if "attention_mask" in inputs:
            inputs["attention_mask"] = attended(inputs["attention_mask"])
        aside = {name: kept(tensor, 0) for name, tensor in self.aside.items()}
        return RowBatch(inputs, kept(self.labels, IGNORED), aside)

    def _each(self, change: Any) -> "RowBatch":
        inputs = {name: change(tensor) for name, tensor in self.inputs.items()}
        return RowBatch(inputs, change(self.labels), {name: change(tensor) for name, tensor in self.aside.items()})


def _flat(values: torch.Tensor) -> torch.Tensor:
    """Returns (n, all the rest), also where n is 0."""
    return values[:, None] if values.ndim == 1 else values.flatten(1)


def attended(mask: torch.Tensor) -> torch.Tensor:
    """Returns an attention mask, int64 (n, T), in which an empty row looks at its first place.

    A row without any place to look at is 0 / 0 in some attention kernels, and what is not a number spreads.
    """
    mask = mask.clone()
    mask[:, 0] = 1
    return mask
