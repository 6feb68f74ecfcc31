"""LoRA-SB for federations: only a small square matrix between two frozen orthonormal factors is trained."""

from typing import Any

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
from torch import nn
from torch.nn import functional

from offsite.adapter.inject import seeded, train_only
from offsite.adapter.side_modules import add_parallel, is_side_module
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import choose, default_targets, in_slots, is_linear, lengths
from offsite.errors import ConfigError


class Between(nn.Module):
    """x -> scale * B R A x with orthonormal rows of A and columns of B, both frozen; R is zero at the start."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor, scale: float, device: torch.device) -> None:
        super().__init__()
        rank = down.shape[0]
        self.matrix = nn.Parameter(torch.zeros(rank, rank, dtype=torch.float32, device=device))
        self.register_buffer("down", down.to(device), persistent=False)
        self.register_buffer("up", up.to(device), persistent=False)
        self.scale = scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the update of the layer's output, (..., outputs), in the dtype of R."""
        low = functional.linear(hidden, self.down.to(hidden.dtype))
        return functional.linear(functional.linear(low, self.matrix), self.up.to(hidden.dtype)) * self.scale


def attach_fed_sb(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Adds B R A alpha / rank to the targets' weights; R, (rank, rank), is trained, A and B are drawn from the seed.

    Singhal et al. 2025, arXiv 2502.15436, section 3. There A and B come from a singular value decomposition of a first
    gradient, which here would be a release of its own that costs privacy: they are random instead.

    Raises:
      ConfigError: the rank is above a target's width.
    """
    found = choose(in_slots(model, spec.slots, is_linear), spec, default_targets(model, DEFAULTS))
    generator = seeded(spec.seed)
    for name, module in found.items():
        inputs, outputs = lengths(module)
        if spec.rank > min(inputs, outputs):
            raise ConfigError(f"rank={spec.rank} is above the width of {name}, {min(inputs, outputs)}; lower it")
        down, up = (_orthonormal(length, spec.rank, generator) for length in (inputs, outputs))
        device = next(module.parameters()).device
        add_parallel(module, Between(down.T.contiguous(), up, spec.alpha / spec.rank, device))
    train_only(model, is_side_module)
    return model


def _orthonormal(length: int, rank: int, generator: torch.Generator) -> Any:
    """Returns a random matrix with orthonormal columns, float32 (length, rank).

    In float64, and with the signs fixed that the decomposition leaves open, so that machines whose libraries round
    otherwise have the same matrix up to the last digit of float32.
    """
    drawn = torch.randn(length, rank, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(drawn)
    return (q * r.diagonal().sign()).float()
