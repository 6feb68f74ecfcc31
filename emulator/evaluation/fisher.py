"""The Fisher mask: which entries of the frozen weights matter most, by gradients on public data alone."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from offsite.adapter.auxiliary import AuxiliaryTensors
from offsite.adapter.methods.masked import kept, largest, mask_specs, masked_targets, place_name
from offsite.adapter.spec import AdapterSpec
from offsite.errors import DataError, RangeError
from offsite.task.spec import Batch, Task


def fisher_places(model: nn.Module, spec: AdapterSpec, task: Task, examples: Batch) -> AuxiliaryTensors:
    """Returns the positions of the entries with most Fisher information in each target's weight, by tensor name.

    The mask takes a share `density` of each matrix, the first of equal entries; Sung et al. 2021, arXiv 2111.09839,
    section 3.1, take the largest entries of all matrices together.

    Args:
      model: the plain model before any adapter, of any floating dtype; left unchanged.
      spec: spec of an adapter with method "masked".
      task: task that computes the losses.
      examples: public examples, at least one.

    Raises:
      DataError: there are no examples.
      RangeError: a gradient is not finite.
    """
    wanted = mask_specs(model, spec)
    targets = masked_targets(model, spec)
    weights = {path: module.get_parameter("weight") for path, module in targets.items()}
    fisher = empirical_fisher(model, weights, task, examples)
    return {
        (name := place_name(path)): largest(fisher[path], kept(module, spec)).to("cpu", wanted[name].dtype)
        for path, module in targets.items()
    }


def empirical_fisher(
    model: nn.Module, weights: Mapping[str, nn.Parameter], task: Task, examples: Batch
) -> dict[str, Tensor]:
    """Returns the diagonal of the empirical Fisher information of weights: the mean square of an example's gradient.

    Examples go through the model one at a time, in float32 whatever the model's dtype.

    Args:
      model: the model; left unchanged.
      weights: parameters of the model, under any names.
      task: task that computes a loss for each example.
      examples: examples, at least one.

    Returns:
      The information of each entry, float32 in the shape of the weight, under the names of `weights`.

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
    """Makes all parameters and buffers at least float32 and frozen, and the model evaluate, within the context.

    Squares of small gradients are 0 in 16 bits, and position would then decide between equal entries.
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
