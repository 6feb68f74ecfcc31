"""Batches of tokenised examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offsite.errors import DataError


@dataclass(frozen=True)
class Examples:
    """Token sequences of one length; each row is one record, the unit that differential privacy protects.

    Attributes:
      input_ids: token ids, int64 (n, T).
      attention_mask: 1 for tokens and 0 for padding, int64 (n, T); padding is only on the right.
      answers: 1 for the tokens that are learnt, for example an answer after its prompt, else 0, int64 (n, T); None to
        learn all tokens.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answers: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Refuses tensors of different shapes."""
        ids, mask = tuple(self.input_ids.shape), tuple(self.attention_mask.shape)
        if len(ids) != 2 or ids != mask:
            raise DataError(f"input_ids shape={ids} and attention_mask shape={mask} must be one (n, T); encode again")
        if self.answers is not None and tuple(self.answers.shape) != ids:
            raise DataError(f"answers shape={tuple(self.answers.shape)} must be that of input_ids, {ids}; encode again")

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def select(self, indices: Sequence[int] | Any) -> "Examples":
        """Returns the rows at integer indices, in that order; a sequence, an array or a tensor, which may be empty."""
        rows = torch.as_tensor(indices, dtype=torch.long, device=self.input_ids.device).reshape(-1)
        return self._each(lambda tensor: tensor[rows])

    @property
    def predicted(self) -> torch.Tensor:
        """1 for each predicted token after the first, else 0, in the mask's dtype, (n, T - 1)."""
        learnt = self.attention_mask if self.answers is None else self.attention_mask * self.answers
        return learnt[:, 1:]

    @property
    def targets(self) -> torch.Tensor:
        """Number of predicted tokens of each row, int64 (n,): all tokens but the first, or the tokens of answers."""
        return self.predicted.sum(dim=1)

    def within(self, model: nn.Module) -> "Examples":
        """Returns the examples; an example with an id that the model does not know is emptied."""
        vocabulary = vocabulary_of(model)
        return self._kept(((self.input_ids >= 0) & (self.input_ids < vocabulary)).all(dim=1))

    def emptied(self, rows: Sequence[int]) -> "Examples":
        """Returns the examples; those at the indices `rows` are all padding."""
        return self._kept(all_but(rows, len(self), self.input_ids.device))

    @classmethod
    def dummy_batch(cls, vocabulary: int, length: int, *, seed: int) -> "Examples":
        """Returns two random records for a trial of a model, one half as long as the other.

        Args:
          vocabulary: number of token ids, >= 1.
          length: tokens of the longer record, >= 2.
          seed: secret seed of the content; a model that knew the seed could behave well on these records only.
        """
        ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(seed))
        widths = torch.tensor([length, max(length // 2, 2)])
        return cls(ids, (torch.arange(length)[None, :] < widths[:, None]).long())

    def to(self, device: torch.device | str) -> "Examples":
        """Returns the examples on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def _kept(self, fits: torch.Tensor) -> "Examples":
        return self._each(lambda tensor: tensor * fits[:, None].long())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Examples":
        answers = None if self.answers is None else change(self.answers)
        return Examples(change(self.input_ids), change(self.attention_mask), answers)


def all_but(rows: Sequence[int], count: int, device: torch.device) -> torch.Tensor:
    """Returns False at the indices `rows` and else True, bool (count,)."""
    kept = torch.ones(count, dtype=torch.bool, device=device)
    kept[torch.as_tensor(rows, dtype=torch.long, device=device)] = False
    return kept


def vocabulary_of(model: nn.Module) -> int:
    """Returns the number of token ids that a model knows."""
    config: Any = model.config
    return int(config.get_text_config().vocab_size)
