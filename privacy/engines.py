"""Per-example gradients, by two engines behind one interface."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from errors import PrivacyRefusal

Losses = Callable[[nn.Module, Any], Tensor]


class Batch(Protocol):
    """What a batch must offer: a length, and a selection of its examples."""

    def __len__(self) -> int:
        """Returns the number of examples."""

    def select(self, indices: Any) -> "Batch":
        """Returns the examples at the indices."""


Gradients = Callable[[Losses, Any], tuple[Tensor, list[Tensor]]]


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns the trainable parameters with their names, sorted by name."""
    return sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)


@contextmanager
def adapters_only(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode, except the modules that own trainable parameters.

    Opacus records only modules in training mode, and everything else must behave as it does when the model is used: no
    dropout of the frozen model, no running statistics.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in model.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            module.training = True
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def hooks(model: nn.Module) -> Iterator[Gradients]:
    """Opacus' hooks: one backward pass, per-example gradients from activations and output gradients."""
    parameters = trainable(model)
    recorder = GradSampleHooks(model, loss_reduction="sum")

    def gradients(losses: Losses, batch: Any) -> tuple[Tensor, list[Tensor]]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            values = losses(model, batch)
            values.sum().backward()
        found = [_taken(name, parameter) for name, parameter in parameters]
        return values.detach(), found

    try:
        with adapters_only(model):
            yield gradients
    finally:
        recorder.remove_hooks()
        _forget(model)


def _taken(name: str, parameter: Any) -> Tensor:
    sample = getattr(parameter, "grad_sample", None)
    parameter.grad_sample = parameter.grad = None
    if not isinstance(sample, Tensor):
        raise PrivacyRefusal(f"parameter={name}: Opacus' hooks gave no per-example gradient; use the loop engine")
    return sample.detach()


def _forget(model: nn.Module) -> None:
    for parameter in model.parameters():
        for attribute in ("grad_sample", "_forward_counter", "_current_grad_sample"):
            if hasattr(parameter, attribute):
                delattr(parameter, attribute)
    for module in model.modules():
        if hasattr(module, "activations"):
            del module.activations


@contextmanager
def loop(model: nn.Module) -> Iterator[Gradients]:
    """Batches of one: exact for every method, with the least memory, and slower on short records."""
    parameters = [parameter for _, parameter in trainable(model)]

    def gradients(losses: Losses, batch: Any) -> tuple[Tensor, list[Tensor]]:
        values, rows = [], []
        for place in range(len(batch)):
            value = losses(model, batch.select([place]))
            grads = torch.autograd.grad(value.sum(), parameters, allow_unused=True)
            rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)])
            values.append(value.detach().reshape(-1))
        stacked = [torch.stack([row[i] for row in rows]) for i in range(len(parameters))]
        return torch.cat(values), stacked

    with adapters_only(model):
        yield gradients


ENGINES: dict[str, Callable[[nn.Module], Any]] = {"hooks": hooks, "loop": loop}
