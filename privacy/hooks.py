"""Opacus' hooks as an engine: the reference for the other engines."""

import warnings

import torch
from torch import Tensor, nn

from offsite.errors import PrivacyRefusal
from offsite.privacy.batches import Batch, Losses, trainable
from offsite.privacy.captured import Captured
from offsite.privacy.faults import is_memory
from offsite.privacy.per_example import Rows, Weigh, checked_losses, finite_losses, line_of

_MODULE = ("activations", "max_batch_len", "autograd_grad_sample_hooks", "ft_compute_sample_grad")
_PARAMETER = ("grad_sample", "summed_grad", "_forward_counter", "_current_grad_sample")


class HooksEngine:
    """One forward and one backward for the whole batch, one gradient row per example and parameter.

    Opacus records a module's inputs only in training mode, so the modules that own trainable parameters are put in
    training mode. All others keep their mode, and the dropout of a frozen base stays off.

    Args:
      model: model with an adapter.

    Raises:
      PrivacyRefusal: Opacus does not support the model.
    """

    def __init__(self, model: nn.Module) -> None:
        from opacus.grad_sample import GradSampleHooks  # takes 2 s of CPU, and most models are served by other engines

        self._model = model
        self._parameters = trainable(model)
        try:
            # loss_reduction="sum": our losses are summed, so a row of the backward pass is one example's own.
            self._hooks = GradSampleHooks(model, loss_reduction="sum", strict=True)
        except Exception as error:  # Opacus has no type of its own for what it does not support
            for handle in model.__dict__.get("autograd_grad_sample_hooks", ()):
                handle.remove()
            _forget(model)
            if is_memory(error):
                raise MemoryError(line_of(error)) from error
            raise PrivacyRefusal(f"engine='hooks' cannot attach: {line_of(error)}; use engine='loop'") from error
        owners = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
        self._modes = [(module, module.training) for module in owners]
        for module in owners:
            module.training = True  # not .train(), which would also turn on the dropout of its children

    def close(self) -> None:
        """Removes every hook and attribute, and puts the modes back."""
        self._hooks.cleanup()
        _forget(self._model)
        for module, mode in self._modes:
            module.training = mode

    def add(self, losses_fn: Losses, batch: Batch, weigh: Weigh) -> Rows:
        """See `privacy.per_example.Engine`."""

        def forward(part: Batch) -> Tensor:
            self._reset()
            return checked_losses(losses_fn, self._model, part)

        finite = finite_losses(forward, batch)
        if finite is None:
            self._reset()
            return Rows()
        losses, kept = finite
        captured = self._backward(losses, len(batch))
        rows, norms = captured.add(list(self._parameters.values()), weigh, kept)
        self._reset()
        values = losses.detach().double().tolist()
        return Rows(tuple(rows), tuple(values[row] for row in rows), tuple(norms.tolist()))

    def _backward(self, losses: Tensor, size: int) -> Captured:
        with warnings.catch_warnings():
            # The input of the first trainable module comes from frozen ones; its weights' gradients are exact.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            losses.sum().backward()
        captured = Captured(size)
        for name, parameter in self._parameters.items():
            parameter.grad = None  # the plain sum of gradients, which must not be stepped on
            rows = parameter.grad_sample
            if not isinstance(rows, torch.Tensor) or rows.shape != (size, *parameter.shape):
                shape = tuple(rows.shape) if isinstance(rows, torch.Tensor) else None
                raise PrivacyRefusal(
                    f"engine='hooks': grad_sample of {name!r} has shape={shape}, must be one row for each of "
                    f"{size} examples; use engine='loop'"
                )
            captured.put(parameter, rows.detach())
        return captured

    def _reset(self) -> None:
        """Forgets a forward pass that had no backward pass, and the rows of the last batch."""
        for module in self._model.modules():
            for attribute in ("activations", "max_batch_len"):
                module.__dict__.pop(attribute, None)
        for parameter in self._parameters.values():
            parameter.__dict__.pop("_current_grad_sample", None)
            parameter.grad_sample = None
            parameter._forward_counter = 0


def _forget(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None
        for attribute in _PARAMETER:
            parameter.__dict__.pop(attribute, None)
    for module in model.modules():
        for attribute in _MODULE:
            module.__dict__.pop(attribute, None)
