"""What comes back: second moments of the loss' gradients at the blocks' outputs; one pass serves all blocks."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from offsite.emulator.calibration.source import Source
from offsite.emulator.calibration.stream import bare


def cotangent_moments(
    source: Source, paths: tuple[str, ...], losses: Callable[[nn.Module], Tensor | Iterable[Tensor]]
) -> dict[str, Tensor]:
    """Returns for each of some blocks the mean of v v^T over positions, float64 (width, width).

    v is the gradient of the public loss with respect to what leaves the block, times the root mean square of that: the
    blocks behind read hidden states through a norm, so a position whose states are large passes on less of v.

    Args:
      source: of the model, in memory or of shards.
      paths: of the blocks, in order.
      losses: the mean loss of a model on public examples, whole or in chunks.
    """
    watch = _Watch(paths)
    handles = [source.model.get_submodule(path).register_forward_hook(watch.at(path)) for path in paths]
    try:
        with source.passing(), torch.enable_grad():
            chunks = losses(source.model)
            for loss in (chunks,) if isinstance(chunks, Tensor) else chunks:
                watch.collect(loss)
    finally:
        for handle in handles:
            handle.remove()
    return {path: total / max(watch.positions[path], 1) for path, total in watch.totals.items()}


class _Watch:
    """Keeps what leaves some blocks of a call until its loss is there."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        self._outputs: list[tuple[str, Tensor]] = []
        self.totals: dict[str, Tensor] = {}
        self.positions = dict.fromkeys(paths, 0)

    def at(self, path: str) -> Any:
        """Returns a forward hook."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = bare(output)
            if torch.is_grad_enabled():
                # No weight needs a gradient: the graph begins at the first block that is watched.
                self._outputs.append((path, hidden if hidden.requires_grad else hidden.requires_grad_()))

        return hook

    def collect(self, loss: Tensor) -> None:
        """Adds the gradients of one loss, and lets its graph go."""
        found = torch.autograd.grad(loss, [h for _, h in self._outputs], allow_unused=True, materialize_grads=True)
        for (path, hidden), gradient in zip(self._outputs, found, strict=True):
            size = hidden.detach().double().square().mean(-1, keepdim=True).sqrt()
            flat = (gradient.double() * size).reshape(-1, gradient.shape[-1])
            moments = flat.T @ flat
            self.totals[path] = self.totals[path] + moments if path in self.totals else moments
            self.positions[path] += len(flat)
        self._outputs.clear()
