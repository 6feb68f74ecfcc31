"""A masked update: trains only the entries of a weight matrix that matter most in the base model."""

import math

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
from torch import nn
from torch.nn import functional

from offsite.adapter.auxiliary import NO_AUXILIARY, AuxiliarySpec, AuxiliaryTensors, RequiredTensors, positions
from offsite.adapter.inject import train_only
from offsite.adapter.options import Option, resolve
from offsite.adapter.side_modules import add_parallel, is_side_module
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import Found, choose, default_targets, in_slots, is_linear

MAGNITUDE, FISHER = "magnitude", "fisher"
OPTIONS = (Option("density", 0.01, 1e-6, 1.0), Option("by", MAGNITUDE, choices=(MAGNITUDE, FISHER)))
PLACES = "places"


class MaskedUpdate(nn.Module):
    """x -> x times a sparse matrix with trained values, zero at the start.

    The matrix is dense during a forward pass, because a sparse product would need one multiplication for each example,
    token and entry.

    Attributes:
      values: trained entries, float32 (k,).
      places: ascending positions of the entries in the flattened weight, int64 (k,).
    """

    def __init__(self, weight: torch.Tensor, places: torch.Tensor, *, transposed: bool) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(len(places), dtype=torch.float32, device=weight.device))
        self.register_buffer(PLACES, places.to(weight.device, torch.int64), persistent=False)
        self._shape, self._transposed = tuple(weight.shape), transposed

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the update of the layer's output, (..., outputs), in the dtype of the values."""
        flat = self.values.new_zeros(self._shape[0] * self._shape[1]).scatter(0, self.places, self.values)
        update = flat.reshape(self._shape)
        return functional.linear(hidden, update.T if self._transposed else update)


def largest(weight: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the positions of the entries of largest magnitude in the flattened weight, ascending, int64 (count,).

    Of equal entries the earlier ones are taken, so that every party finds the same positions.
    """
    order = torch.sort(weight.detach().float().abs().flatten(), descending=True, stable=True).indices
    return order[:count].sort().values


def attach_masked(model: nn.Module, spec: AdapterSpec, auxiliary: AuxiliaryTensors = NO_AUXILIARY) -> nn.Module:
    """Trains a share `density` of each target's weight: the largest entries, or those of most Fisher information.

    A mask by magnitude follows from weights that coordinator and sites both have, as in Bhardwaj et al. 2024 (SHiRA),
    arXiv 2406.13175, section 3.1. A mask by Fisher information is an auxiliary tensor: the coordinator computes the
    mask from public data (see `emulator.evaluation.fisher`), as in Sung et al. 2021, arXiv 2111.09839, section 3.
    Neither mask costs private data, and only the values travel between rounds.
    """
    for name, module in masked_targets(model, spec).items():
        weight = _weight(module)
        places = auxiliary[place_name(name)] if by_fisher(spec) else largest(weight, kept(module, spec))
        add_parallel(module, MaskedUpdate(weight, places, transposed=not isinstance(module, nn.Linear)))
    train_only(model, is_side_module)
    return model


def masked_targets(model: nn.Module, spec: AdapterSpec) -> Found:
    """Returns the dense layers whose weights a spec masks, by path, sorted."""
    return choose(in_slots(model, spec.slots, is_linear), spec, default_targets(model, DEFAULTS))


def kept(module: nn.Module, spec: AdapterSpec) -> int:
    """Returns how many entries of a dense layer's weight are trained, at least 1."""
    density = float(resolve(spec.options, OPTIONS, spec.method)["density"])
    return max(1, round(density * _weight(module).numel()))


def by_fisher(spec: AdapterSpec) -> bool:
    """Whether the mask of a spec is an auxiliary tensor, computed from Fisher information."""
    return resolve(spec.options, OPTIONS, spec.method)["by"] == FISHER


def place_name(path: str) -> str:
    """Returns the name of the auxiliary tensor with the positions for the dense layer at a path."""
    return f"{path}.{PLACES}"


def mask_specs(model: nn.Module, spec: AdapterSpec) -> RequiredTensors:
    """Returns the specs of the positions for a mask by Fisher information; an empty mapping for a mask by magnitude."""
    if not by_fisher(spec):
        return {}
    targets = masked_targets(model, spec).items()
    return {place_name(path): positions(kept(m, spec), math.prod(_weight(m).shape)) for path, m in targets}


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight  # a layer that is stored as codes makes its weight at this call
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"a {type(module).__name__} has no weight")
    return weight


AUXILIARY = AuxiliarySpec(
    mask_specs, attach_masked, "by='fisher' needs the positions that the coordinator computed; take them from the job"
)
