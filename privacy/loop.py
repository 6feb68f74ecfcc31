"""A batch of one example at a time: exact for every method, with the least memory."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offsite.privacy.batches import Batch, Losses, trainable
from offsite.privacy.norms import row_norms
from offsite.privacy.per_example import Rows, Weigh, add_scaled, add_to_sum, checked_losses


class LoopEngine:
    """One forward and one backward per example; only the weighted sum of the gradients is kept.

    Args:
      model: model with an adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = list(trainable(model).values())

    def close(self) -> None:
        """Removes the sums."""
        for parameter in self._parameters:
            parameter.__dict__.pop("summed_grad", None)

    def add(self, losses_fn: Losses, batch: Batch, weigh: Weigh) -> Rows:
        """See `privacy.per_example.Engine`."""
        # Apart from the parameters' sums: a batch on which the model fails half way must leave nothing there.
        totals = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in self._parameters]
        kept, values, norms = [], [], []
        for position in range(len(batch)):
            losses = checked_losses(losses_fn, self._model, batch.select([position]))
            if not bool(torch.isfinite(losses.detach()).all()):
                continue
            gradients = one_gradient(losses[0], self._parameters)
            norm = torch.stack([row_norms(g[None]).cpu()[0] for g in gradients]).square().sum().sqrt()
            if not math.isfinite(float(norm)):
                continue
            factor = float(weigh(norm[None], (position,))[0])
            for total, gradient in zip(totals, gradients, strict=True):
                add_scaled(total, gradient, factor)
            kept.append(position)
            values.append(float(losses.detach()))
            norms.append(float(norm))
        for parameter, total in zip(self._parameters, totals, strict=True):
            add_to_sum(parameter, total)
        return Rows(tuple(kept), tuple(values), tuple(norms))


def one_gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
    """Returns the gradient of one loss by parameter; zero for a parameter that the loss does not depend on."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return tuple(
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, gradients, strict=True)
    )
