"""LoRA-SB for federations: trains only a small square matrix between two frozen orthonormal factors."""

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

    Singhal et al. 2025, arXiv 2502.15436, section 3. The paper takes A and B from a singular value decomposition of a
    first gradient; here such a gradient would be a release that costs privacy, so A and B are random.

    Raises:
      ConfigError: the rank is above a target's width.
    """
    targets = choose(in_slots(model, spec.slots, is_linear), spec, default_targets(model, DEFAULTS))
    generator = seeded(spec.seed)
    for name, module in targets.items():
        inputs, outputs = lengths(module)
        if spec.rank > min(inputs, outputs):
            raise ConfigError(f"rank={spec.rank} must be at most {min(inputs, outputs)}, the width of {name}; lower it")
        down, up = (_orthonormal(length, spec.rank, generator) for length in (inputs, outputs))
        device = next(module.parameters()).device
        add_parallel(module, Between(down.T.contiguous(), up, spec.alpha / spec.rank, device))
    train_only(model, is_side_module)
    return model


def _orthonormal(length: int, rank: int, generator: torch.Generator) -> Any:
    """Returns a random matrix with orthonormal columns, float32 (length, rank).

    The decomposition is computed in float64, and the signs that it leaves open are fixed, so that machines whose
    libraries round differently get the same matrix up to the last digit of float32.
    """
    drawn = torch.randn(length, rank, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(drawn)
    return (q * r.diagonal().sign()).float()
