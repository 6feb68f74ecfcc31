"""Per-example gradients of one batch, held whole or as their two factors; norms and weighted sums."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from offsite.privacy.norms import row_norms
from offsite.privacy.per_example import Weigh, add_scaled, add_to_sum

# A dense layer's gradients are held whole as long as they have at most this many times the numbers of their factors.
# Above, norms are taken from one example's gradient at a time, which is computed twice: a third more work and no more
# memory. Norms from Gram matrices ("ghost norms") would be cheaper for short texts, but where positions cancel they
# come out too small in float32 for a bound on one record's influence.
KEEP_UP_TO = 4


@dataclass
class Pair:
    """A dense layer's per-example gradients as their factors: example i has outer[i].T @ inner[i].

    Attributes:
      outer: factor of the matrix's first dimension, (B, T, first).
      inner: factor of the matrix's second dimension, (B, T, second).
    """

    outer: Tensor
    inner: Tensor

    def whole(self, row: int) -> Tensor:
        """Returns one example's gradient, (first, second); the same bits at every call."""
        return self.outer[row].T @ self.inner[row]

    def joined(self, other: "Pair") -> "Pair":
        """Returns the gradients of a layer that ran twice: sums over the positions of both runs."""
        return Pair(torch.cat([self.outer, other.outer], 1), torch.cat([self.inner, other.inner], 1))


@dataclass
class Captured:
    """What a backward pass left of one batch, by parameter.

    Attributes:
      size: B, number of examples in the batch.
      rows: whole gradients, (B, *shape), by the parameter's id.
      pairs: factors of gradients, by the parameter's id.
    """

    size: int
    rows: dict[int, Tensor] = field(default_factory=dict)
    pairs: dict[int, Pair] = field(default_factory=dict)

    def put(self, parameter: nn.Parameter, rows: Tensor) -> None:
        """Adds whole gradients, (B, *shape), to a parameter's; a parameter that is used twice has the sum of both."""
        held = self.rows.get(id(parameter))
        self.rows[id(parameter)] = rows if held is None else held + rows

    def put_pair(self, parameter: nn.Parameter, pair: Pair) -> None:
        """Adds the gradients of a matrix, whole where that takes little memory."""
        positions, first, second = pair.outer.shape[1], pair.outer.shape[2], pair.inner.shape[2]
        if first * second <= KEEP_UP_TO * positions * (first + second):
            self.put(parameter, torch.bmm(pair.outer.transpose(1, 2), pair.inner))
            return
        held = self.pairs.get(id(parameter))
        self.pairs[id(parameter)] = pair if held is None else held.joined(pair)

    def norms(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Returns the Euclidean norm of each example's whole gradient, float64 (B,)."""
        squares = torch.zeros(self.size, dtype=torch.float64)
        for parameter in parameters:
            squares += self._squares(parameter).to(squares.device)
        return squares.sqrt()

    def add(self, parameters: Sequence[nn.Parameter], weigh: Weigh, kept: Sequence[int]) -> tuple[list[int], Tensor]:
        """Adds the weighted sums to the parameters' `summed_grad`.

        Args:
          parameters: all trainable parameters; a parameter without a gradient here gets zeros.
          weigh: see `privacy.per_example.Weigh`.
          kept: positions, in [0, B), of the examples that count.

        Returns:
          Positions of the examples that count and whose gradient is finite, and their norms, float64.
        """
        norms = self.norms(parameters)
        rows = [row for row in kept if math.isfinite(norms[row])]  # none is multiplied by 0, since 0 * NaN is NaN
        factors: list[float] = weigh(norms[rows], tuple(rows)).tolist()
        totals = [self._weighted(parameter, factors, rows) for parameter in parameters]
        for parameter, total in zip(parameters, totals, strict=True):
            add_to_sum(parameter, total)
        return rows, norms[rows]

    def _squares(self, parameter: nn.Parameter) -> Tensor:
        if id(parameter) in self.pairs:
            return torch.cat([row_norms(self._gradient(parameter, row)[None]).square() for row in range(self.size)])
        rows = self.rows.get(id(parameter))
        return torch.zeros(self.size, dtype=torch.float64) if rows is None else row_norms(rows).square()

    def _weighted(self, parameter: nn.Parameter, factors: Sequence[float], rows: Sequence[int]) -> Tensor:
        """Returns the weighted sum of a parameter's gradients, float64.

        What is added are the gradients whose norms were taken, one example at a time. A product over the whole batch
        would round to the largest terms of any example: an example whose positions cancel would wipe out the others.
        """
        total = torch.zeros_like(parameter, dtype=torch.float64)
        if id(parameter) in self.rows or id(parameter) in self.pairs:
            for row, factor in zip(rows, factors, strict=True):
                add_scaled(total, self._gradient(parameter, row), factor)
        return total

    def _gradient(self, parameter: nn.Parameter, row: int) -> Tensor:
        """Returns one example's gradient of a parameter that has one; the same bits at every call."""
        rows, pair = self.rows.get(id(parameter)), self.pairs.get(id(parameter))
        parts = ([] if rows is None else [rows[row]]) + ([] if pair is None else [pair.whole(row)])
        return sum(parts[1:], parts[0])
