"""Per-example gradients of one batch, held whole or as their two factors; norms and weighted sums."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from offsite.privacy.norms import row_norms
from offsite.privacy.per_example import Weigh, add_to_sum

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
        """Returns one example's gradient, (first, second)."""
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
          kept: position in the batch of each of the B examples.

        Returns:
          Indices of the examples, in [0, B), whose gradient is finite, and their norms, float64.
        """
        norms = self.norms(parameters)
        finite = torch.nonzero(torch.isfinite(norms)).flatten()  # an index, since 0 * NaN is NaN
        rows: list[int] = finite.tolist()
        factors = weigh(norms[finite], tuple(kept[row] for row in rows))
        everyone = len(rows) == self.size
        totals = [self._weighted(parameter, factors, None if everyone else finite) for parameter in parameters]
        for parameter, total in zip(parameters, totals, strict=True):
            add_to_sum(parameter, total)
        return rows, norms[finite]

    def _squares(self, parameter: nn.Parameter) -> Tensor:
        rows, pair = self.rows.get(id(parameter)), self.pairs.get(id(parameter))
        if pair is None:
            return torch.zeros(self.size, dtype=torch.float64) if rows is None else row_norms(rows).square()
        squares = []
        for index in range(self.size):
            whole = pair.whole(index) if rows is None else pair.whole(index) + rows[index]
            squares.append(row_norms(whole[None]).square())
        return torch.cat(squares)

    def _weighted(self, parameter: nn.Parameter, factors: Tensor, finite: Tensor | None) -> Tensor:
        rows, pair = self.rows.get(id(parameter)), self.pairs.get(id(parameter))
        parts = []
        if rows is not None:
            chosen = rows if finite is None else rows[finite.to(rows.device)]
            parts.append(torch.tensordot(factors.to(chosen), chosen, dims=1))
        if pair is not None:
            outer, inner = (t if finite is None else t[finite.to(t.device)] for t in (pair.outer, pair.inner))
            outer = outer * factors.to(outer)[:, None, None]
            parts.append(outer.flatten(0, 1).T @ inner.flatten(0, 1))
        return sum(parts[1:], parts[0]) if parts else torch.zeros_like(parameter)
