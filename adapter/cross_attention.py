"""The cross attentions of a denoiser's blocks, in which image positions attend to prompts, and their masks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import Found, in_slots
from offsite.errors import ConfigError, UnsupportedModel

# A denoiser adds -10000 (1 - mask) to the attention score of a token, so mask 1 shows a token and mask 0 hides it. Mask
# -1 hides a token as well, and marks it as part of an image prompt and not padding; see `task.image_prompt`.
BLOCKED = -10000.0
_BETWEEN = 1.5 * BLOCKED
_PARTS = ("to_q", "to_k", "to_v", "to_out", "heads")
_BESIDES = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj", "residual_connection")


def cross_attentions(model: nn.Module, spec: AdapterSpec) -> Found:
    """Returns the cross attentions of diffusers' blocks in the slots by full name, sorted, at least one for each slot.

    Raises:
      ConfigError: the spec names targets.
      UnsupportedModel: a slot has no cross attention, or a cross attention does more than attention.
    """
    if spec.targets:
        raise ConfigError(
            f"targets={spec.targets!r}, method {spec.method!r} sits in cross attentions; leave targets empty"
        )
    found = in_slots(model, spec.slots, _is_cross)
    for slot in spec.slots:
        if not any(name.startswith(f"{slot}.") for name in found):
            raise UnsupportedModel(
                f"slot={slot!r} has no cross attention, must have one, as in PixArt and U-nets; take method 'lora'"
            )
    for name, attention in found.items():
        if odd := [part for part in _BESIDES if getattr(attention, part, None) not in (None, False)]:
            raise UnsupportedModel(
                f"{name} has {odd[0]}, which method {spec.method!r} does not know; take method 'lora'"
            )
    return found


def states_and_mask(arguments: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the prompt that a cross attention reads, (B, S, width), and the mask added to its scores, (B, 1, S).

    Args:
      arguments: the keyword arguments of a call of the cross attention.

    Raises:
      UnsupportedModel: the states are not an argument by name, or the mask is not the same for all positions.
    """
    states, mask = arguments.get("encoder_hidden_states"), arguments.get("attention_mask")
    if not isinstance(states, torch.Tensor) or states.ndim != 3:
        raise UnsupportedModel("a cross attention does not get its states as a named argument; take method 'lora'")
    if mask is not None and tuple(mask.shape) != (len(states), 1, states.shape[1]):
        raise UnsupportedModel("a cross attention does not get one mask for all positions; take method 'lora'")
    return states, mask


def is_image(mask: torch.Tensor) -> torch.Tensor:
    """Returns which tokens belong to an image prompt, bool (B, S), from a mask added to scores, (B, 1, S)."""
    return mask[:, 0] < _BETWEEN


def _is_cross(module: nn.Module) -> bool:
    return bool(getattr(module, "is_cross_attention", False)) and all(hasattr(module, part) for part in _PARTS)
