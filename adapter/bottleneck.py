"""A bottleneck adapter at the output of each slot's block."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from adapter.inject import copy_seeded, train_only
from adapter.spec import AdapterSpec
from adapter.targets import hidden_size, in_slots
from errors import ConfigError, UnsupportedModel

CHILD = "offsite_bottleneck"


class Bottleneck(nn.Module):
    """hidden + up(GELU(down(hidden))), computed in float32; up is zero at the start."""

    def __init__(self, width: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, device=device, dtype=torch.float32)
        self.up = nn.Linear(rank, width, device=device, dtype=torch.float32)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns adapted hidden states, same shape (..., width) and dtype."""
        update = self.up(functional.gelu(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + update.to(hidden.dtype)


def attach_bottleneck(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Adds one bottleneck of width rank behind each slot's block, after its feed-forward layer and residual sum.

    Houlsby et al. 2019, arXiv 1902.00751, section 2.1; one per block as in Pfeiffer et al. 2021, arXiv 2005.00247.

    Raises:
      ConfigError: the spec names targets, which this method has none of.
    """
    if spec.targets:
        raise ConfigError(f"targets={spec.targets!r}, method 'bottleneck' sits behind blocks; leave targets empty")
    in_slots(model, spec.slots, lambda module: True)
    blocks = {slot: model.get_submodule(slot) for slot in sorted(spec.slots)}
    widths = {slot: hidden_size(block) for slot, block in blocks.items()}
    for slot, block in blocks.items():
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws first; the seed's values replace it below
            block.add_module(CHILD, Bottleneck(widths[slot], spec.rank, next(block.parameters()).device))
        block.register_forward_hook(_adapted)
    copy_seeded((block.get_submodule(CHILD).down.weight for block in blocks.values()), spec.seed, _kaiming)
    train_only(model, lambda name: f".{CHILD}." in f".{name}")
    return model


def _kaiming(tensor: Any, generator: torch.Generator) -> Any:
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def _adapted(block: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook; a module-level function, so that a deep copy of the model uses its own adapter."""
    adapter = block.get_submodule(CHILD)
    if isinstance(output, torch.Tensor):
        return adapter(output)
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        return (adapter(output[0]), *output[1:])
    raise UnsupportedModel(
        f"block output={type(output).__name__}, a bottleneck needs a tensor or a tuple; take method 'ffa_lora'"
    )
