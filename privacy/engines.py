"""The table of engines: ways to get one gradient per example.

An engine is opened on a model for the length of one training, and leaves no trace on it when closed:

    with ENGINES["hooks"](model) as engine:
        rows = engine.per_example(losses_fn, batch)  # fills p.grad_sample of every trainable parameter
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn

from errors import PrivacyRefusal
from privacy.batches import Batch, Losses, trainable


@dataclass(frozen=True)
class Rows:
    """Which examples of a batch have a row in `grad_sample`; private, both fields.

    Attributes:
      kept: positions in the batch, ascending; an example whose loss is not finite has no row.
      losses: their losses, in the same order.
    """

    kept: tuple[int, ...]
    losses: tuple[float, ...]


class Engine(Protocol):
    """One way to get one gradient per example."""

    def per_example(self, losses_fn: Losses, batch: Batch) -> Rows:
        """Sets `p.grad_sample` (len(kept), *p.shape) on every trainable parameter p of the model.

        Raises:
          PrivacyRefusal: the gradients cannot be told apart by example.
        """
        ...


def checked_losses(losses_fn: Losses, model: nn.Module, batch: Batch) -> torch.Tensor:
    """Returns the losses of a batch, (B,).

    Raises:
      PrivacyRefusal: they are not one number per example.
    """
    losses = losses_fn(model, batch)
    if tuple(losses.shape) != (len(batch),):
        raise PrivacyRefusal(
            f"losses shape={tuple(losses.shape)} must be one loss per example, ({len(batch)},); "
            "return the mean over each example's own targets"
        )
    return losses


def no_rows(model: nn.Module) -> Rows:
    """Sets `grad_sample` to zero examples, which is what an empty Poisson batch has."""
    for parameter in trainable(model).values():
        _set_rows(parameter, parameter.new_zeros((0, *parameter.shape)))
    return Rows((), ())


class HooksEngine:
    """Opacus' hooks: one forward and one backward for the whole batch.

    Opacus records a module's inputs only in training mode, so the modules that own trainable parameters are put in
    it; all others keep the mode they have, and the dropout of a frozen base stays off.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = trainable(model)
        try:
            # loss_reduction="sum": our losses are summed, so a row of the backward pass is that example's own.
            self._hooks = GradSampleHooks(model, loss_reduction="sum", strict=True)
        except Exception as error:  # Opacus has no type of its own for what it does not support
            for handle in model.__dict__.get("autograd_grad_sample_hooks", ()):
                handle.remove()
            _forget(model)
            raise PrivacyRefusal(f"engine='hooks' cannot attach: {_line(error)}; use engine='loop'") from error

    def close(self) -> None:
        """Removes every hook and attribute."""
        self._hooks.cleanup()
        _forget(self._model)

    def per_example(self, losses_fn: Losses, batch: Batch) -> Rows:
        """See `Engine`."""
        kept = list(range(len(batch)))
        while kept:
            self._reset()
            losses = checked_losses(losses_fn, self._model, batch)
            finite = torch.isfinite(losses.detach()).tolist()
            if all(finite):
                return self._backward(losses, kept)
            # Without the others' rows: a NaN must not meet them in the backward pass, where 0 * NaN is NaN.
            batch = batch.select([row for row, good in enumerate(finite) if good])
            kept = [position for position, good in zip(kept, finite, strict=True) if good]
        self._reset()
        return no_rows(self._model)

    def _backward(self, losses: torch.Tensor, kept: list[int]) -> Rows:
        with warnings.catch_warnings():
            # The input of the first trainable module comes from frozen ones; its weights' gradients are exact.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            losses.sum().backward()
        for name, parameter in self._parameters.items():
            parameter.grad = None  # the plain sum of gradients, which must not be stepped on
            rows = parameter.grad_sample
            if not isinstance(rows, torch.Tensor) or rows.shape != (len(kept), *parameter.shape):
                found = tuple(rows.shape) if isinstance(rows, torch.Tensor) else None
                raise PrivacyRefusal(
                    f"engine='hooks': grad_sample of {name!r} has shape={found}, must be one row for each of "
                    f"{len(kept)} examples; use engine='loop'"
                )
        return Rows(tuple(kept), tuple(losses.detach().double().tolist()))

    def _reset(self) -> None:
        """Forgets a forward pass that had no backward pass, and the rows of the last batch."""
        for module in self._model.modules():
            for attribute in ("activations", "max_batch_len"):
                module.__dict__.pop(attribute, None)
        for parameter in self._parameters.values():
            parameter.__dict__.pop("_current_grad_sample", None)
            _set_rows(parameter, None)
            parameter._forward_counter = 0


class LoopEngine:
    """A batch of one example at a time: exact for every method, and the least memory."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = trainable(model)

    def close(self) -> None:
        """Removes the rows."""
        _forget(self._model)

    def per_example(self, losses_fn: Losses, batch: Batch) -> Rows:
        """See `Engine`."""
        rows: list[tuple[torch.Tensor, ...]] = []
        kept, values = [], []
        for position in range(len(batch)):
            losses = checked_losses(losses_fn, self._model, batch.select([position]))
            if bool(torch.isfinite(losses.detach()).all()):
                rows.append(one_gradient(losses[0], list(self._parameters.values())))
                kept.append(position)
                values.append(float(losses.detach()))
        if not rows:
            return no_rows(self._model)
        for parameter, gradients in zip(self._parameters.values(), zip(*rows, strict=True), strict=True):
            _set_rows(parameter, torch.stack(gradients))
        return Rows(tuple(kept), tuple(values))


def one_gradient(loss: torch.Tensor, parameters: Sequence[nn.Parameter]) -> tuple[torch.Tensor, ...]:
    """Returns the gradient of one loss; zero where a parameter had no part in it."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return tuple(
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, found, strict=True)
    )


def _set_rows(parameter: nn.Parameter, rows: torch.Tensor | None) -> None:
    parameter.grad_sample = rows


def _forget(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None
        for attribute in ("grad_sample", "summed_grad", "_forward_counter", "_current_grad_sample"):
            parameter.__dict__.pop(attribute, None)
    for module in model.modules():
        for attribute in ("activations", "max_batch_len", "autograd_grad_sample_hooks", "ft_compute_sample_grad"):
            module.__dict__.pop(attribute, None)


def _line(error: Exception) -> str:
    """Returns the first line of a foreign exception, short."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


@contextmanager
def _hooks(model: nn.Module) -> Iterator[HooksEngine]:
    owners = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    modes = [(module, module.training) for module in owners]
    engine = HooksEngine(model)
    try:
        for module in owners:
            module.training = True  # not .train(), which would also turn on the dropout of its children
        yield engine
    finally:
        engine.close()
        for module, mode in modes:
            module.training = mode


@contextmanager
def _loop(model: nn.Module) -> Iterator[LoopEngine]:
    engine = LoopEngine(model)
    try:
        yield engine
    finally:
        engine.close()


ENGINES: dict[str, Callable[[nn.Module], Any]] = {"hooks": _hooks, "loop": _loop}
