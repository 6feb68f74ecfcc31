"""How a module's per-example gradients follow from its inputs and from the gradients of its outputs."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from offsite.errors import PrivacyRefusal
from offsite.privacy.captured import Captured, Pair
from offsite.privacy.per_example import line_of
from offsite.privacy.tap import Call

log = logging.getLogger("offsite.privacy")
Rule = Callable[[nn.Module, str, Call, list[Tensor], Captured], None]
"""(module, path of the module, call, gradients of the call's outputs, receiver of the per-example gradients)."""

DENSE = ("LinearChange",)
NORMS = ("LayerNorm", "RMSNorm", "CastNorm", "NormChange")


def rule_of(module: nn.Module) -> Rule | None:
    """Returns the closed-form rule of a module; None for any other module, and for a subclass with another forward.

    A norm over the last dimension is recognised by its class' name, as nothing else distinguishes it from norms over
    other dimensions. So is a dense layer with a change, y = x (W + change)^T + b, whose gradient is that of W. The
    start-up probe compares the gradients of every rule.
    """
    forward = type(module).forward
    if forward is nn.Linear.forward or type(module).__name__ in DENSE:
        return linear
    if forward is Conv1D.forward:
        return transposed
    own = dict(module.named_parameters(recurse=False))
    vectors = set(own) <= {"weight", "bias"} and all(p.ndim == 1 for p in own.values())
    named = type(module).__name__.endswith(NORMS)
    return norm if named and vectors and not any(module.children()) else None


def linear(module: nn.Module, path: str, call: Call, gradients: list[Tensor], captured: Captured) -> None:
    """Rule of a dense layer, y = x W^T + b: example i's gradient of W is the sum over positions t of g_it x_it^T."""
    _dense(module, path, call, gradients, captured, transpose=False)


def transposed(module: nn.Module, path: str, call: Call, gradients: list[Tensor], captured: Captured) -> None:
    """Rule of GPT-2's Conv1D, y = x W + b."""
    _dense(module, path, call, gradients, captured, transpose=True)


def _dense(
    module: nn.Module, path: str, call: Call, gradients: list[Tensor], captured: Captured, *, transpose: bool
) -> None:
    inputs, gradient = _by_position(path, call, gradients, captured.size)
    weight, bias = _trainable(module, "weight"), _trainable(module, "bias")
    if bias is not None:
        captured.put(bias, gradient.to(bias).sum(1))
    if weight is not None:
        inputs, gradient = inputs.to(weight), gradient.to(weight)
        captured.put_pair(weight, Pair(inputs, gradient) if transpose else Pair(gradient, inputs))


def norm(module: nn.Module, path: str, call: Call, gradients: list[Tensor], captured: Captured) -> None:
    """Rule of a norm, y = n(x) * (c + w) + b for any normalisation n: n(x) is what one more w adds to y."""
    inputs, gradient = _by_position(path, call, gradients, captured.size)
    weight, bias = _trainable(module, "weight"), _trainable(module, "bias")
    if bias is not None:
        captured.put(bias, gradient.to(bias).sum(1))
    if weight is not None:
        with torch.no_grad():
            zero = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
            unit = zero | {"weight": torch.ones_like(weight)}
            normal = functional_call(module, unit, (inputs,)) - functional_call(module, zero, (inputs,))
        captured.put(weight, (gradient.to(weight) * normal.to(weight)).sum(1))


class Recomputed:
    """Rule of any module: runs it on one example at a time, and differentiates its outputs weighted by their gradients.

    It uses `vmap` over the examples where torch can, and else a loop over them; each module's first batch decides.
    """

    def __init__(self) -> None:
        self._looped: set[str] = set()

    def __call__(self, module: nn.Module, path: str, call: Call, gradients: list[Tensor], captured: Captured) -> None:
        """See `Rule`.

        Raises:
          PrivacyRefusal: an input or output tensor has neither one entry per example nor one entry for all.
        """
        size = captured.size
        for tensor in (*call.inputs, *gradients):
            if tensor.ndim == 0 or tensor.shape[0] not in (1, size):
                raise _leading(path, tuple(tensor.shape), size)
        if any(gradient.shape[0] != size for gradient in gradients):
            raise _leading(path, tuple(gradients[0].shape), size)
        for name, rows in self._rows(module, path, call, gradients).items():
            captured.put(module.get_parameter(name), rows.detach())

    def _rows(self, module: nn.Module, path: str, call: Call, gradients: list[Tensor]) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        mapped = [tensor.shape[0] == gradients[0].shape[0] for tensor in call.inputs]

        def product(values: dict[str, Tensor], inputs: tuple[Tensor, ...], back: tuple[Tensor, ...]) -> Tensor:
            batched = [tensor[None] if each else tensor for tensor, each in zip(inputs, mapped, strict=True)]
            args, kwargs = call.arguments(batched)
            output = functional_call(module, values, args, kwargs)
            leaves = [leaf for leaf in pytree.tree_leaves(output) if _floating(leaf)]
            return torch.stack([(leaf[0] * g).sum() for leaf, g in zip(leaves, back, strict=True)]).sum()

        if path not in self._looped:
            in_dims = (None, tuple(0 if each else None for each in mapped), 0)
            try:
                rows: dict[str, Tensor] = vmap(grad(product), in_dims=in_dims)(
                    parameters, call.inputs, tuple(gradients)
                )
            except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
                log.info("module %s goes through a loop: %s", path, line_of(error))
                self._looped.add(path)
            else:
                return rows
        return _looped(product, parameters, call, mapped, gradients)


def _looped(
    product: Callable[..., Tensor],
    parameters: dict[str, Tensor],
    call: Call,
    mapped: list[bool],
    gradients: list[Tensor],
) -> dict[str, Tensor]:
    """Computes the same by ordinary autograd, for modules that branch on values or use functions unknown to `vmap`."""
    rows: list[tuple[Tensor, ...]] = []
    with torch.enable_grad():
        leaves = {name: value.clone().requires_grad_(True) for name, value in parameters.items()}
        for row in range(gradients[0].shape[0]):
            inputs = tuple(t[row] if each else t for t, each in zip(call.inputs, mapped, strict=True))
            loss = product(leaves, inputs, tuple(gradient[row] for gradient in gradients))
            parts = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            rows.append(
                tuple(torch.zeros_like(p) if g is None else g for p, g in zip(leaves.values(), parts, strict=True))
            )
    return {name: torch.stack(column) for name, column in zip(leaves, zip(*rows, strict=True), strict=True)}


def _floating(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _trainable(module: nn.Module, name: str) -> nn.Parameter | None:
    parameter = module._parameters.get(name)
    return parameter if parameter is not None and parameter.requires_grad else None


def _by_position(path: str, call: Call, gradients: list[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Returns input and gradient as (B, T, features), with T the product of the dimensions in between."""
    inputs, gradient = call.inputs[0], gradients[0]
    for tensor in (inputs, gradient):
        if tensor.ndim < 2 or tensor.shape[0] != size:
            raise _leading(path, tuple(tensor.shape), size)
    return inputs.reshape(size, -1, inputs.shape[-1]), gradient.reshape(size, -1, gradient.shape[-1])


def _leading(path: str, shape: tuple[int, ...], size: int) -> PrivacyRefusal:
    return PrivacyRefusal(
        f"module={path!r} works on shape={shape}, its first length must be the {size} examples of the batch; "
        "use engine='loop'"
    )
