"""AdapterFusion: trained attention over several frozen bottlenecks of earlier jobs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offsite.adapter.auxiliary import NO_AUXILIARY, AuxiliarySpec, AuxiliaryTensors
from offsite.adapter.inject import OWN, copy_seeded, train_only
from offsite.adapter.methods.bottleneck import slot_blocks
from offsite.adapter.methods.frozen_bottleneck import HINT, FrozenBottleneck, add_after_block, frozen_specs
from offsite.adapter.options import Option, resolve
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import hidden_size

FUSION = f"{OWN}fusion"
OPTIONS = (Option("adapters", 2, 2, 16),)
START_STD = 0.02


class Fusion(nn.Module):
    """value(hidden + the updates of frozen adapters, weighed by a softmax at each position), computed in float32.

    The weight of adapter n is the softmax over n of query(hidden) . key(update n). The paper sums the values of
    hidden + update n with these weights; since the weights add up to 1, that sum is the value of hidden + the weighed
    updates. For the same reason a bias of the key would have no effect, so the key has no bias.

    Attributes:
      query, key: dense layers from width to rank; in the paper both are as wide as the model.
      value: dense layer from width to width, the identity at the start.
    """

    def __init__(self, width: int, rank: int, frozen: Sequence[FrozenBottleneck], device: torch.device) -> None:
        super().__init__()

        def dense(outputs: int, *, bias: bool) -> nn.Linear:
            return nn.utils.skip_init(nn.Linear, width, outputs, bias=bias, device=device, dtype=torch.float32)

        for number, adapter in enumerate(frozen):  # not a ModuleList, which would look like a tower of blocks
            self.add_module(f"frozen_{number}", adapter)
        self.query, self.key, self.value = dense(rank, bias=True), dense(rank, bias=False), dense(width, bias=False)
        nn.init.zeros_(self.query.bias)
        nn.init.eye_(self.value.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the mixed hidden states, same shape (..., width) and dtype."""
        read = hidden.to(self.query.weight.dtype)
        frozen = (child for child in self.children() if isinstance(child, FrozenBottleneck))
        updates = torch.stack([adapter.update(read) for adapter in frozen], dim=-2)
        scores = (self.key(updates) * self.query(read).unsqueeze(-2)).sum(-1)
        mixed = (scores.softmax(-1).unsqueeze(-1) * updates).sum(-2)
        output: Tensor = self.value(read + mixed)
        return output.to(hidden.dtype)


def attach_fusion(model: nn.Module, spec: AdapterSpec, auxiliary: AuxiliaryTensors = NO_AUXILIARY) -> nn.Module:
    """Adds frozen bottlenecks, as many as option `adapters`, after each slot's block, and trains attention over them.

    Pfeiffer et al. 2021 (AdapterFusion), arXiv 2005.00247, section 3. Query and key have width rank, so that their
    products stay narrow; the paper has rank = width. Value starts as the identity, so that the output is the block's
    output plus the mix; query and key start from N(0, 0.02^2), as in AdapterHub.

    Raises:
      ConfigError: the spec names targets, or an option is out of range.
    """
    blocks = slot_blocks(model, spec)
    for slot, block in blocks.items():
        device = next(block.parameters()).device
        frozen = [FrozenBottleneck(auxiliary, slot, number, device) for number in range(count(spec))]
        add_after_block(block, FUSION, Fusion(hidden_size(block), spec.rank, frozen, device))
    names = ("query.weight", "key.weight")
    drawn = (blocks[slot].get_submodule(FUSION).get_parameter(name) for slot in sorted(blocks) for name in names)
    copy_seeded(drawn, spec.seed, _normal)
    train_only(model, lambda name: f".{FUSION}." in f".{name}")
    return model


def count(spec: AdapterSpec) -> int:
    """Returns how many frozen adapters a spec of this method mixes."""
    return int(resolve(spec.options, OPTIONS, spec.method)["adapters"])


def _normal(tensor: Any, generator: torch.Generator) -> Any:
    return nn.init.normal_(tensor, std=START_STD, generator=generator)


AUXILIARY = AuxiliarySpec(lambda model, spec: frozen_specs(model, spec, count(spec)), attach_fusion, HINT, count)
