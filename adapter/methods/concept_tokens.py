"""Learned words: tokens after each prompt that only the slots' cross attentions read."""

from typing import Any

import torch
from torch import nn

from offsite.adapter.cross_attention import cross_attentions, states_and_mask
from offsite.adapter.inject import OWN, copy_seeded, train_only
from offsite.adapter.spec import AdapterSpec

CHILD = f"{OWN}concept"
SPREAD = 0.02  # standard deviation of the initial values: close to an empty token


class Concept(nn.Module):
    """Tokens that are appended to every prompt; each example has its own copy, and so its own gradient."""

    def __init__(self, tokens: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(tokens, width, dtype=torch.float32, device=device))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Returns states (B, S + tokens, width) for states (B, S, width), same dtype."""
        return torch.cat([states, self.tokens.to(states.dtype).expand(len(states), -1, -1)], dim=1)


def attach_concept_tokens(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Appends rank learned tokens to the prompt that each cross attention in the slots reads.

    Textual Inversion (Gal et al. 2022, arXiv 2208.01618, section 3) learns the embedding of a new word. Records here
    hold the output of the text encoder, so the word is learned after that encoder, with other values for each layer, as
    in P+ (Voynov et al. 2023, arXiv 2303.09522, section 3.2). The word is part of every prompt.

    Raises:
      ConfigError: the spec names targets.
      UnsupportedModel: as for `cross_attentions`.
    """
    attentions = cross_attentions(model, spec).values()
    for attention in attentions:
        keys: Any = attention.to_k
        attention.add_module(CHILD, Concept(spec.rank, int(keys.in_features), next(attention.parameters()).device))
        attention.register_forward_pre_hook(_append_tokens, with_kwargs=True)
    drawn = (attention.get_submodule(CHILD).get_parameter("tokens") for attention in attentions)
    copy_seeded(drawn, spec.seed, lambda tensor, generator: nn.init.normal_(tensor, 0.0, SPREAD, generator))
    train_only(model, lambda name: f".{CHILD}." in f".{name}")
    return model


def _append_tokens(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook; a module-level function, so that a deep copy of the model uses its own tokens."""
    states, mask = states_and_mask(kwargs)
    longer = attention.get_submodule(CHILD)(states)
    if mask is not None:
        mask = torch.cat([mask, mask.new_zeros(len(mask), 1, longer.shape[1] - states.shape[1])], dim=2)
    return args, {**kwargs, "encoder_hidden_states": longer, "attention_mask": mask}
