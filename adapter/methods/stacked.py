"""MAD-X: a trained task bottleneck on top of a frozen language bottleneck of an earlier job."""

from torch import nn

from offsite.adapter.auxiliary import NO_AUXILIARY, AuxiliarySpec, AuxiliaryTensors
from offsite.adapter.methods.bottleneck import attach_bottleneck, slot_blocks
from offsite.adapter.methods.frozen_bottleneck import FROZEN, HINT, FrozenBottleneck, add_after_block, frozen_specs
from offsite.adapter.spec import AdapterSpec


def attach_madx(model: nn.Module, spec: AdapterSpec, auxiliary: AuxiliaryTensors = NO_AUXILIARY) -> nn.Module:
    """Adds a frozen language bottleneck after each slot's block, and then a trained task bottleneck of width rank.

    Pfeiffer et al. 2020, arXiv 2005.00052, sections 3.2 and 3.3: the task adapter reads the output of the language
    adapter. Its update is added to that output, so that at its start, where the update is zero, the output is the
    language adapter's; the paper adds the update to the block's output. Invertible adapters are left out, because
    embeddings lie outside the slots.

    Raises:
      ConfigError: the spec names targets.
    """
    for slot, block in slot_blocks(model, spec).items():
        add_after_block(block, FROZEN, FrozenBottleneck(auxiliary, slot, 0, next(block.parameters()).device))
    return attach_bottleneck(model, spec)


AUXILIARY = AuxiliarySpec(lambda model, spec: frozen_specs(model, spec, 1), attach_madx, HINT, lambda spec: 1)
