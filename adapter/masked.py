"""A masked update: the entries of a weight matrix that are largest in the base model are trained, and no others."""

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
from torch import nn
from torch.nn import functional

from adapter.beside import add_beside, is_beside
from adapter.inject import train_only
from adapter.options import Option, resolve
from adapter.spec import AdapterSpec
from adapter.targets import choose, default_targets, in_slots, is_linear

OPTIONS = (Option("density", 0.01, 1e-6, 1.0),)


class MaskedUpdate(nn.Module):
    """x -> x times a sparse matrix, whose values are trained and zero at the start.

    The matrix is written out densely for the length of a forward pass: an entry at a time would need one product for
    each example, token and entry.

    Attributes:
      values: float32 (k,).
      places: int64 (k,), positions in the flattened weight, ascending.
    """

    def __init__(self, weight: torch.Tensor, count: int, *, transposed: bool) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(count, dtype=torch.float32, device=weight.device))
        self.register_buffer("places", largest(weight, count), persistent=False)
        self._shape, self._transposed = tuple(weight.shape), transposed

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the update of the layer's output, (..., outputs), in the dtype of the values."""
        flat = self.values.new_zeros(self._shape[0] * self._shape[1]).scatter(0, self.places, self.values)
        update = flat.reshape(self._shape)
        return functional.linear(hidden, update.T if self._transposed else update)


def largest(weight: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the positions of the entries of largest magnitude in the flattened weight, ascending, int64 (count,).

    Of equal entries the first count, so that every party finds the same.
    """
    order = torch.sort(weight.detach().float().abs().flatten(), descending=True, stable=True).indices
    return order[:count].sort().values


def attach_masked(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Trains a share `density` of the entries of each target's weight, those of largest magnitude in the base model.

    The mask follows from weights that coordinator and sites both have, so no data are spent on it and only the values
    travel. Sparse fine-tuning with a fixed mask as in Sung et al. 2021, arXiv 2111.09839, section 3, and Bhardwaj et
    al. 2024 (SHiRA), arXiv 2406.13175, section 3.1, from which the choice by magnitude is.
    """
    density = float(resolve(spec.options, OPTIONS, spec.method)["density"])
    found = choose(in_slots(model, spec.slots, is_linear), spec, default_targets(model, DEFAULTS))
    for module in found.values():
        weight = module.get_parameter("weight")
        count = max(1, round(density * weight.numel()))
        add_beside(module, MaskedUpdate(weight, count, transposed=not isinstance(module, nn.Linear)))
    train_only(model, is_beside)
    return model
