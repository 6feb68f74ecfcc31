"""One gradient per example: what every engine does with a batch, and what it reports.

An engine is opened on a model for the length of one training, and leaves no trace on the model when closed:

    with ENGINES["bookkeeping"](model) as engine:
        rows = engine.add(losses_fn, batch, weigh)  # p.summed_grad += sum over examples of factor * gradient
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from offsite.errors import PrivacyRefusal
from offsite.privacy.batches import Batch, Losses

Weigh = Callable[[Tensor, tuple[int, ...]], Tensor]
"""(gradient norms float64 (b,), all finite; positions in the batch) -> factors float64 (b,)."""


@dataclass(frozen=True)
class Rows:
    """The examples of a batch that are in the sum; every field is private.

    Attributes:
      kept: positions in the batch, ascending; an example whose loss or gradient is not finite is missing.
      losses: losses of these examples, in the same order.
      norms: Euclidean norms of their whole gradients, in the same order.
    """

    kept: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()


class Engine(Protocol):
    """One way to get one gradient per example."""

    def add(self, losses_fn: Losses, batch: Batch, weigh: Weigh) -> Rows:
        """Adds each example's gradient times its factor to `p.summed_grad`, float64, of every trainable parameter.

        The whole batch is added, or, where this raises, nothing of it. `weigh` sees finite norms only: an example whose
        loss or gradient is NaN or infinite leaves no trace in the sum.

        Args:
          losses_fn: (model, batch) -> one loss per example, (B,).
          batch: B examples.
          weigh: factors of the gradients, see `Weigh`.

        Raises:
          PrivacyRefusal: the gradients cannot be split by example.
        """
        ...

    def close(self) -> None:
        """Removes whatever the engine put on the model."""
        ...


def checked_losses(losses_fn: Losses, model: nn.Module, batch: Batch) -> Tensor:
    """Returns the losses of a batch, (B,).

    Raises:
      PrivacyRefusal: `losses_fn` did not return one number per example.
    """
    losses = losses_fn(model, batch)
    if tuple(losses.shape) != (len(batch),):
        raise PrivacyRefusal(
            f"losses shape={tuple(losses.shape)} must be one loss per example, ({len(batch)},); "
            "return the mean over each example's own targets"
        )
    return losses


def finite_losses(forward: Callable[[Any], Tensor], batch: Batch) -> tuple[Tensor, list[int]] | None:
    """Returns finite losses of a batch, (B,), with the positions of the examples that count; None where none counts.

    The model runs again where a loss is not finite: a NaN must not meet the others in the backward pass, where 0 * NaN
    is NaN. Another example of the batch stands in its place then, and counts once. So the batch keeps its shape, and
    the others keep every bit: a shorter batch is rounded otherwise.

    Args:
      forward: batch -> losses (B,), starting from nothing each time.
      batch: B examples.
    """
    own = list(range(len(batch)))
    rows, good = own, set(own)
    while good:
        losses = forward(batch if rows == own else batch.select(rows))
        finite = torch.isfinite(losses.detach()).tolist()
        if all(finite):
            return losses, sorted(good)
        good -= {row for row, fits in zip(rows, finite, strict=True) if not fits}
        rows = [row if row in good else min(good, default=0) for row in own]
    return None


def add_scaled(total: Tensor, gradient: Tensor, factor: float) -> None:
    """Adds a gradient times its factor to a sum, in float64.

    In float32 a factor below 1e-38 would keep few of its bits or none, and the clipped gradient could be longer than
    the bound.

    Args:
      total: sum, float64.
      gradient: gradient of one example, any floating dtype, of the same shape.
      factor: factor of the gradient, a Python float.
    """
    total.add_(gradient, alpha=factor)  # torch widens the gradient a block at a time, and needs no copy of it


def add_to_sum(parameter: nn.Parameter, total: Tensor) -> None:
    """Adds one batch's weighted sum, float64, to `parameter.summed_grad`."""
    held = parameter.__dict__.get("summed_grad")
    parameter.summed_grad = total if held is None else held.add_(total)


def line_of(error: Exception) -> str:
    """Returns the first line of a foreign exception, cut to 160 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
