"""Tokenised examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from errors import DataError


@dataclass(frozen=True)
class Examples:
    """Token sequences of one length; one row is one record, the unit that differential privacy protects.

    Attributes:
      input_ids: int64 (n, T).
      attention_mask: int64 (n, T), 1 on tokens, 0 on padding; padding only on the right.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    def __post_init__(self) -> None:
        """Refuses shapes that do not belong together."""
        ids, mask = tuple(self.input_ids.shape), tuple(self.attention_mask.shape)
        if len(ids) != 2 or ids != mask:
            raise DataError(f"input_ids shape={ids} and attention_mask shape={mask} must be one (n, T); encode again")

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def select(self, indices: Sequence[int] | Any) -> "Examples":
        """Returns the examples at the indices, in that order; integers of any sequence, array or tensor, none too."""
        rows = torch.as_tensor(indices, dtype=torch.long, device=self.input_ids.device).reshape(-1)
        return Examples(self.input_ids[rows], self.attention_mask[rows])

    @property
    def targets(self) -> torch.Tensor:
        """Number of tokens of each row that are predicted, int64 (n,): all but its first."""
        return self.attention_mask[:, 1:].sum(dim=1)

    def within(self, vocabulary: int) -> "Examples":
        """Returns the examples with those emptied that hold an id outside a vocabulary, on which a model would fail."""
        fits = ((self.input_ids >= 0) & (self.input_ids < vocabulary)).all(dim=1, keepdim=True).long()
        return Examples(self.input_ids * fits, self.attention_mask * fits)

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
        return Examples(self.input_ids.to(device), self.attention_mask.to(device))
