"""MAD-X: a trained task bottleneck on top of a frozen one, which was trained for a language in an earlier job."""

from torch import nn

from offsite.adapter.auxiliary import NO_AUXILIARY, AuxiliarySpec, AuxiliaryTensors
from offsite.adapter.methods.bottleneck import attach_bottleneck, slot_blocks
from offsite.adapter.methods.frozen_bottleneck import FROZEN, HINT, FrozenBottleneck, add_behind, frozen_wants
from offsite.adapter.spec import AdapterSpec


def attach_madx(model: nn.Module, spec: AdapterSpec, given: AuxiliaryTensors = NO_AUXILIARY) -> nn.Module:
    """Adds a given, frozen bottleneck behind each slot's block, and a trained one of width rank behind that.

    Pfeiffer et al. 2020, arXiv 2005.00052, sections 3.2 and 3.3: the task adapter reads what the language adapter
    writes. It is added to that, so that at its start, where it is zero, the output is the language adapter's own; in
    the paper it is added to the block's. Invertible adapters are not part: embeddings lie outside the slots.

    Raises:
      ConfigError: the spec names targets, which this method has none of.
    """
    for slot, block in slot_blocks(model, spec).items():
        add_behind(block, FROZEN, FrozenBottleneck(given, slot, 0, next(block.parameters()).device))
    return attach_bottleneck(model, spec)


TAKES = AuxiliarySpec(lambda model, spec: frozen_wants(model, spec, 1), attach_madx, HINT, lambda spec: 1)
