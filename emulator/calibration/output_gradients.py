"""Second moments of the loss' gradients at the blocks' outputs; one pass serves all blocks."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from offsite.emulator.calibration.source import Source
from offsite.emulator.calibration.stream import bare


def cotangent_moments(
    source: Source, paths: tuple[str, ...], losses: Callable[[nn.Module], Tensor | Iterable[Tensor]]
) -> dict[str, Tensor]:
    """Returns the mean of v v^T over positions for each of some blocks, float64 (width, width) by path.

    v is the gradient of the public loss with respect to the block's output, times the output's root mean square: later
    blocks read hidden states through a norm, so a position with large states passes on less of v.

    Args:
      source: the full model, in memory or in shards.
      paths: paths of the blocks, in order.
      losses: function that returns a model's mean loss on public examples, whole or in chunks.
    """
    sums = _CotangentSums(paths)
    handles = [source.model.get_submodule(path).register_forward_hook(sums.hook(path)) for path in paths]
    try:
        with source.passing(), torch.enable_grad():
            chunks = losses(source.model)
            for loss in (chunks,) if isinstance(chunks, Tensor) else chunks:
                sums.collect(loss)
    finally:
        for handle in handles:
            handle.remove()
    return {path: total / max(sums.positions[path], 1) for path, total in sums.totals.items()}


class _CotangentSums:
    """Keeps the outputs of some blocks until the loss of the call is there, and sums the gradients' second moments."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        self._outputs: list[tuple[str, Tensor]] = []
        self.totals: dict[str, Tensor] = {}
        self.positions = dict.fromkeys(paths, 0)

    def hook(self, path: str) -> Any:
        """Returns a forward hook that keeps the block's output."""

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            hidden = bare(output)
            if torch.is_grad_enabled():
                # No weight needs a gradient: the graph begins at the first watched block.
                self._outputs.append((path, hidden if hidden.requires_grad else hidden.requires_grad_()))

        return keep

    def collect(self, loss: Tensor) -> None:
        """Adds the gradients of one loss, and frees its graph."""
        outputs = [hidden for _, hidden in self._outputs]
        gradients = torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True)
        for (path, hidden), gradient in zip(self._outputs, gradients, strict=True):
            size = hidden.detach().double().square().mean(-1, keepdim=True).sqrt()
            flat = (gradient.double() * size).reshape(-1, gradient.shape[-1])
            moments = flat.T @ flat
            self.totals[path] = self.totals[path] + moments if path in self.totals else moments
            self.positions[path] += len(flat)
        self._outputs.clear()
