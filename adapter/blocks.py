"""Whole blocks are trained, as in offsite-tuning itself: the change of every weight, bias and norm of a slot."""

import copy

import torch
from torch import nn
from torch.func import functional_call

from adapter.beside import add_beside, is_beside, zero_linear
from adapter.inject import train_only
from adapter.spec import AdapterSpec
from adapter.targets import choose, in_slots, is_linear, is_norm, leaf_names, lengths
from errors import UnsupportedModel


class NormChange(nn.Module):
    """What a norm's output gains by a change of its weight and bias; both changes are zero at the start."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        # A bare copy in a tuple: it is called without the norm's hooks, and has no names of its own. A norm is small.
        self._bare = (copy.deepcopy(norm).requires_grad_(False),)
        for name, parameter in norm.named_parameters():
            change = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            self.register_parameter(name, nn.Parameter(change))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the difference of the outputs after and before the change, (..., features)."""
        bare = self._bare[0]
        plain = {name: p.to(hidden.dtype) for name, p in bare.named_parameters()}
        changed = {name: p + getattr(self, name) for name, p in plain.items()}
        after: torch.Tensor = functional_call(bare, changed, (hidden,))
        return after - functional_call(bare, plain, (hidden,))


def attach_blocks(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Trains a change, zero at the start, beside every dense layer and norm of the slots, or of the targets in them.

    Xiao et al. 2023, arXiv 2302.04870, section 3.2. The base weights stay as they are and the changes are float32, so
    that a step below the base's precision is not lost, and what is uploaded is a change to begin with.

    Raises:
      UnsupportedModel: the slots hold parameters of other kinds of layers, which would silently not be trained.
    """
    candidates = in_slots(model, spec.slots, lambda module: is_linear(module) or is_norm(module))
    found = choose(candidates, spec, leaf_names(candidates))
    if not spec.targets:
        _refuse_others(model, spec)
    for module in found.values():
        if is_linear(module):
            bias = getattr(module, "bias", None) is not None
            device = module.get_parameter("weight").device
            add_beside(module, zero_linear(*lengths(module), bias=bias, device=device))
        else:
            add_beside(module, NormChange(module))
    train_only(model, is_beside)
    return model


def _refuse_others(model: nn.Module, spec: AdapterSpec) -> None:
    kept = in_slots(model, spec.slots, lambda module: any(True for _ in module.parameters(recurse=False)))
    for name, module in kept.items():
        if not (is_linear(module) or is_norm(module)):
            raise UnsupportedModel(
                f"layer={name!r} is a {type(module).__name__}, method 'blocks' trains dense layers and norms; name "
                "targets to train only those"
            )
