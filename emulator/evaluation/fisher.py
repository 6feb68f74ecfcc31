"""The Fisher mask: which entries of the frozen weights matter most, by gradients on public data alone."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from offsite.adapter.auxiliary import AuxiliaryTensors
from offsite.adapter.methods.masked import kept, largest, masked_targets, masked_wants, place_name
from offsite.adapter.spec import AdapterSpec
from offsite.errors import DataError, RangeError
from offsite.task.spec import Batch, Task


def fisher_places(model: nn.Module, spec: AdapterSpec, task: Task, examples: Batch) -> AuxiliaryTensors:
    """Returns the positions of the entries of most Fisher information in each target's weight, as given tensors.

    A share `density` of each matrix, the first of equal ones. Sung et al. 2021, arXiv 2111.09839, section 3.1, who
    take the largest of all matrices together.

    Args:
      model: plain, of any floating dtype, before any adapter; left as it was.
      spec: of method "masked".
      task: whose losses count.
      examples: public ones, at least one.

    Raises:
      DataError: there are no examples.
      RangeError: a gradient is not finite.
    """
    wanted = masked_wants(model, spec)
    targets = masked_targets(model, spec)
    weights = {path: module.get_parameter("weight") for path, module in targets.items()}
    found = empirical_fisher(model, weights, task, examples)
    return {
        (name := place_name(path)): largest(found[path], kept(module, spec)).to("cpu", wanted[name].dtype)
        for path, module in targets.items()
    }


def empirical_fisher(
    model: nn.Module, weights: Mapping[str, nn.Parameter], task: Task, examples: Batch
) -> dict[str, Tensor]:
    """Returns the diagonal of the empirical Fisher information of weights: the mean square of an example's gradient.

    One example at a time, in float32 whatever the model is.

    Args:
      model: left as it was.
      weights: parameters of it, under any names.
      task: whose losses count, one per example.
      examples: at least one.

    Raises:
      DataError: there are no examples.
      RangeError: a gradient is not finite.
    """
    if not len(examples):
        raise DataError("public examples=0: Fisher information needs at least one; give public data")
    with _widened(model):
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for weight in weights.values():
            weight.requires_grad_(True)
        for row in range(len(examples)):
            loss = task.losses(model, examples.select([row])).sum()
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total.add_(gradient.square())
    if bad := sorted(name for name, total in sums.items() if not torch.isfinite(total).all()):
        raise RangeError(f"fisher of layer={bad[0]!r} is not finite; check the public examples")
    return {name: total / len(examples) for name, total in sums.items()}


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """Within it every parameter and buffer is at least float32, nothing is trainable, and the model evaluates.

    Squares of small gradients are none in 16 bits, and ties would then be decided by position.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and t.itemsize < 4]
    dtypes = [tensor.dtype for tensor in tensors]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.requires_grad_(False).eval()
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
