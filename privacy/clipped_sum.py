"""The sum of clipped gradients of drawn records, one physical batch after another."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offsite.privacy.batches import Batch, Losses
from offsite.privacy.faults import failure, refuse_broken
from offsite.privacy.norms import CLIP_MARGIN
from offsite.privacy.per_example import Engine, Weigh

log = logging.getLogger("offsite.privacy")


def clipping(max_grad_norm: float, *, private: bool) -> Weigh:
    """Returns the factors that clip gradients to a norm, float64 (b,); all 1 where nothing is private."""
    bound = max_grad_norm * (1 - CLIP_MARGIN)

    def weigh(norms: Tensor, positions: tuple[int, ...]) -> Tensor:
        return (bound / norms).clamp(max=1.0) if private else torch.ones_like(norms)

    return weigh


@dataclass
class Counted:
    """The examples that are in a sum, by their losses and by their gradients' norms before clipping; both private."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def __iadd__(self, other: "Counted") -> "Counted":
        self.losses += other.losses
        self.norms += other.norms
        return self


class ClippedSum:
    """Adds the clipped gradients of records to `p.summed_grad`, float64, of every trainable parameter.

    Where memory is too short for a physical batch, all later ones have half as many examples, down to one. The size
    decides memory and speed, and of the result no more than its rounding.

    Args:
      engine: engine that is open on the model.
      losses: function from model and batch to one loss per example, (B,).
      weigh: factors of the gradients, see `clipping`.
      physical_batch: number of examples in one backward pass, >= 1.
      invented: invented examples, see `privacy.faults`; None to count every fault as a record's.
    """

    def __init__(
        self, engine: Engine, losses: Losses, weigh: Weigh, physical_batch: int, invented: Batch | None
    ) -> None:
        self._engine, self._losses, self._weigh, self._invented = engine, losses, weigh, invented
        self._size = physical_batch
        self._counted = Counted()

    def add(self, records: Batch, drawn: Sequence[int] | np.ndarray) -> Counted:
        """Adds the gradients of some records, and returns the examples that are now in the sum.

        Args:
          records: examples.
          drawn: indices of the examples to add, (size,), which may be empty.

        Raises:
          PrivacyRefusal: the engine cannot tell the examples apart.
          MemoryError: memory is too short for a single example.
          TrainingFault: the model fails on invented records as well.
        """
        self._counted, start = Counted(), 0
        while start < len(drawn):
            part = drawn[start : start + self._size]
            if self._adds(records.select(part)):
                start += len(part)
            else:
                self._size = max(1, len(part) // 2)
                log.warning("memory is too short: physical_batch=%d from now on", self._size)
                if torch.accelerator.is_available():
                    torch.accelerator.empty_cache()
        return self._counted

    def _adds(self, batch: Any) -> bool:
        """Adds a physical batch, and says whether memory was enough; if not, nothing of the batch is in the sum."""
        before = len(self._counted.losses)
        try:
            self._add_good(batch)
        except MemoryError:
            if len(batch) == 1 or len(self._counted.losses) > before:
                raise
            return False
        return True

    def _add_good(self, batch: Any) -> None:
        """Adds a physical batch without the records on which the model fails.

        A fault may not tell on which records the model fails: such records are left out. Another record stands in the
        place of each, so that the batch keeps its shape and all others every bit of their gradients.
        """
        if failure(self._add, batch) is None:
            return
        if self._invented is not None:
            refuse_broken(self._try, self._invented)
        good = {row for row in range(len(batch)) if failure(self._try, batch.select([row])) is None}
        rows = [row if row in good else min(good) for row in range(len(batch)) if good]
        if failure(partial(self._add, counted=good.__contains__), batch.select(rows)) is not None:
            for row in sorted(good):  # they fail together only
                failure(self._add, batch.select([row]))

    def _add(self, batch: Any, counted: Callable[[int], bool] = lambda _: True) -> None:
        rows = self._engine.add(self._losses, batch, _only(counted, self._weigh))
        seen = [place for place, position in enumerate(rows.kept) if counted(position)]
        self._counted += Counted([rows.losses[place] for place in seen], [rows.norms[place] for place in seen])

    def _try(self, batch: Any) -> None:
        """Adds nothing of a batch, or fails as adding would."""
        self._add(batch, lambda _: False)


def _only(counted: Callable[[int], bool], weigh: Weigh) -> Weigh:
    """Returns the factors of `weigh` for the positions that count, and 0 for all others."""

    def factors(norms: Tensor, positions: tuple[int, ...]) -> Tensor:
        return weigh(norms, positions) * torch.tensor([counted(position) for position in positions])

    return factors
