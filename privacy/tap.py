"""A tap on a module: hands over the module's inputs and output gradients once, in the one backward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Received = Callable[["Call", list[Tensor]], None]
"""(the call, gradients of its tensor outputs in order), during the backward pass."""


@dataclass(frozen=True)
class Call:
    """One call of a tapped module; private.

    Attributes:
      inputs: tensors among the call's arguments, in order, detached.
      rest: all arguments in order, with a marker in place of each tensor.
      spec: structure from which arguments and keyword arguments are put together again.
    """

    inputs: tuple[Tensor, ...]
    rest: tuple[Any, ...]
    spec: Any

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns arguments and keyword arguments with other tensors in the places of the inputs."""
        tensors = iter(inputs)
        leaves = [next(tensors) if part is _TENSOR else part for part in self.rest]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


class _Tensor:
    """Marks the place of a tensor among the arguments."""


_TENSOR = _Tensor()


class _Tap(torch.autograd.Function):
    """The identity on a module's outputs; its backward pass hands over the module's inputs and its outputs' gradients.

    Inputs are saved by autograd's own means, so gradient checkpointing drops and recomputes them like any other tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, received: Received, rest: Any, spec: Any, outputs: int, anchor: Tensor, *tensors: Tensor
    ) -> Any:
        ctx.received, ctx.rest, ctx.spec = received, rest, spec
        ctx.needed = len(tensors) - outputs
        ctx.save_for_backward(*tensors[outputs:])
        views = tuple(tensor.view_as(tensor) for tensor in tensors[:outputs])
        return views[0] if outputs == 1 else views

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inputs = tuple(tensor.detach() for tensor in ctx.saved_tensors)
        ctx.received(Call(inputs, ctx.rest, ctx.spec), [gradient.detach() for gradient in gradients])
        return (None, None, None, None, None, *gradients, *([None] * ctx.needed))


class Taps:
    """Taps on some modules of a model, until closed.

    A tapped module computes as before, but autograd forms no gradient of its parameters: that would be the sum over the
    batch, which nobody may use.

    Args:
      modules: pairs of a module and the function that the backward pass calls, once for each of the module's calls in
        the forward pass.
    """

    def __init__(self, modules: Sequence[tuple[nn.Module, Received]]) -> None:
        self._anchor = torch.zeros((), requires_grad=True)  # makes outputs require gradients where inputs do not
        self._modules = [module for module, _ in modules]
        self.active = True
        for module, received in modules:
            self._open(module, received)

    def close(self) -> None:
        """Puts the modules' own forward back."""
        for module in self._modules:
            module.__dict__.pop("forward", None)

    def _open(self, module: nn.Module, received: Received) -> None:
        plain = module.forward
        owners = [(m._parameters, n) for m in module.modules() for n, p in m._parameters.items() if p is not None]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not (self.active and torch.is_grad_enabled()):
                return plain(*args, **kwargs)
            held = [(own, name, own[name]) for own, name in owners]
            for own, name, parameter in held:
                own[name] = parameter.detach()
            try:
                output = plain(*args, **kwargs)
            finally:
                for own, name, parameter in held:
                    own[name] = parameter
            return self._tapped(output, (args, kwargs), received)

        module.forward = forward

    def _tapped(self, output: Any, arguments: Any, received: Received) -> Any:
        leaves, spec = pytree.tree_flatten(arguments)
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        rest = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        outputs, shape = pytree.tree_flatten(output)
        places = [i for i, leaf in enumerate(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        tapped = _Tap.apply(received, rest, spec, len(places), self._anchor, *(outputs[i] for i in places), *inputs)
        for i, tensor in zip(places, (tapped,) if isinstance(tapped, Tensor) else tapped, strict=True):
            outputs[i] = tensor
        return pytree.tree_unflatten(outputs, shape)
