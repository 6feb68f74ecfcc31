"""Tokenised examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offsite.errors import DataError


@dataclass(frozen=True)
class Examples:
    """Token sequences of one length; one row is one record, the unit that differential privacy protects.

    Attributes:
      input_ids: int64 (n, T).
      attention_mask: int64 (n, T), 1 on tokens, 0 on padding; padding only on the right.
      answers: int64 (n, T), 1 on the tokens that are to be learnt, as an answer behind its prompt; None for all.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answers: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Refuses shapes that do not belong together."""
        ids, mask = tuple(self.input_ids.shape), tuple(self.attention_mask.shape)
        if len(ids) != 2 or ids != mask:
            raise DataError(f"input_ids shape={ids} and attention_mask shape={mask} must be one (n, T); encode again")
        if self.answers is not None and tuple(self.answers.shape) != ids:
            raise DataError(f"answers shape={tuple(self.answers.shape)} must be that of input_ids, {ids}; encode again")

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def select(self, indices: Sequence[int] | Any) -> "Examples":
        """Returns the examples at the indices, in that order; integers of any sequence, array or tensor, none too."""
        rows = torch.as_tensor(indices, dtype=torch.long, device=self.input_ids.device).reshape(-1)
        return self._each(lambda tensor: tensor[rows])

    @property
    def predicted(self) -> torch.Tensor:
        """Which tokens behind the first are predicted, 1 or 0, of the mask's dtype (n, T - 1)."""
        learnt = self.attention_mask if self.answers is None else self.attention_mask * self.answers
        return learnt[:, 1:]

    @property
    def targets(self) -> torch.Tensor:
        """Number of tokens of each row that are predicted, int64 (n,): all but its first, or those of answers."""
        return self.predicted.sum(dim=1)

    def within(self, model: nn.Module) -> "Examples":
        """Returns the examples with those emptied that hold an id the model does not know, on which it would fail."""
        vocabulary = vocabulary_of(model)
        fits = ((self.input_ids >= 0) & (self.input_ids < vocabulary)).all(dim=1, keepdim=True).long()
        return self._each(lambda tensor: tensor * fits)

    @classmethod
    def invented(cls, vocabulary: int, length: int, *, seed: int) -> "Examples":
        """Returns two records that nobody wrote, one half as long as the other, to try a model on.

        Args:
          vocabulary: number of token ids, >= 1.
          length: tokens per record, >= 2.
          seed: of what they hold; a model that knew it could behave on them alone.
        """
        ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(seed))
        widths = torch.tensor([length, max(length // 2, 2)])
        return cls(ids, (torch.arange(length)[None, :] < widths[:, None]).long())

    def to(self, device: torch.device | str) -> "Examples":
        """Returns the examples on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Examples":
        answers = None if self.answers is None else change(self.answers)
        return Examples(change(self.input_ids), change(self.attention_mask), answers)


def vocabulary_of(model: nn.Module) -> int:
    """Returns the number of token ids that a model knows."""
    config: Any = model.config
    return int(config.get_text_config().vocab_size)
