"""AdapterFusion: trained attention over several frozen bottlenecks of earlier jobs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offsite.adapter.auxiliary import NO_AUXILIARY, AuxiliarySpec, AuxiliaryTensors
from offsite.adapter.inject import OWN, copy_seeded, train_only
from offsite.adapter.methods.bottleneck import slot_blocks
from offsite.adapter.methods.frozen_bottleneck import HINT, FrozenBottleneck, add_behind, frozen_wants
from offsite.adapter.options import Option, resolve
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import hidden_size

FUSION = f"{OWN}fusion"
OPTIONS = (Option("adapters", 2, 2, 16),)
START_STD = 0.02


class Fusion(nn.Module):
    """value(hidden + the updates of frozen adapters, weighed by a softmax at each position), computed in float32.

    The weight of adapter n is the softmax over n of query(hidden) . key(update n). Values of hidden + update n summed
    with these weights, as in the paper, are the value of hidden + the weighed updates, since the weights add up to 1.
    For the same reason a bias of the key would have no effect, and there is none.

    Attributes:
      query, key: width to rank; the paper's are as wide as the model.
      value: width to width, the identity at the start.
    """

    def __init__(self, width: int, rank: int, frozen: Sequence[FrozenBottleneck], device: torch.device) -> None:
        super().__init__()

        def dense(outputs: int, *, bias: bool) -> nn.Linear:
            return nn.utils.skip_init(nn.Linear, width, outputs, bias=bias, device=device, dtype=torch.float32)

        for number, one in enumerate(frozen):  # no list of modules, which would look like a tower of blocks
            self.add_module(f"frozen_{number}", one)
        self.query, self.key, self.value = dense(rank, bias=True), dense(rank, bias=False), dense(width, bias=False)
        nn.init.zeros_(self.query.bias)
        nn.init.eye_(self.value.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns mixed hidden states, same shape (..., width) and dtype."""
        read = hidden.to(self.query.weight.dtype)
        frozen = (child for child in self.children() if isinstance(child, FrozenBottleneck))
        updates = torch.stack([one.update(read) for one in frozen], dim=-2)
        scores = (self.key(updates) * self.query(read).unsqueeze(-2)).sum(-1)
        mixed = (scores.softmax(-1).unsqueeze(-1) * updates).sum(-2)
        found: Tensor = self.value(read + mixed)
        return found.to(hidden.dtype)


def attach_fusion(model: nn.Module, spec: AdapterSpec, given: AuxiliaryTensors = NO_AUXILIARY) -> nn.Module:
    """Adds `adapters` given, frozen bottlenecks behind each slot's block, and trains the attention that mixes them.

    Pfeiffer et al. 2021 (AdapterFusion), arXiv 2005.00247, section 3. Query and key have width rank, so that their
    products stay narrow; rank = width is the paper's form. Value starts as the identity, so that the output is the
    block's plus the mix; query and key start from N(0, 0.02^2), as in AdapterHub.

    Raises:
      ConfigError: the spec names targets, which this method has none of, or an option is out of range.
    """
    blocks = slot_blocks(model, spec)
    for slot, block in blocks.items():
        device = next(block.parameters()).device
        frozen = [FrozenBottleneck(given, slot, number, device) for number in range(count(spec))]
        add_behind(block, FUSION, Fusion(hidden_size(block), spec.rank, frozen, device))
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


TAKES = AuxiliarySpec(lambda model, spec: frozen_wants(model, spec, count(spec)), attach_fusion, HINT, count)
