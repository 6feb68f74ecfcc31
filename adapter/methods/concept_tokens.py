"""Learned words: tokens behind each prompt that only the slots' cross attentions read."""

from typing import Any

import torch
from torch import nn

from offsite.adapter.cross_attention import cross_attentions, told
from offsite.adapter.inject import OWN, copy_seeded, train_only
from offsite.adapter.spec import AdapterSpec

CHILD = f"{OWN}concept"
SPREAD = 0.02  # standard deviation of the first values: hardly more than a token of nothing


class Concept(nn.Module):
    """Tokens that are put behind every prompt; each example has its own copy, so its gradient is its own."""

    def __init__(self, tokens: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(tokens, width, dtype=torch.float32, device=device))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Returns states (B, S + tokens, width) of (B, S, width), same dtype."""
        return torch.cat([states, self.tokens.to(states.dtype).expand(len(states), -1, -1)], dim=1)


def attach_concept_tokens(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Adds rank learned tokens behind what each cross attention in the slots is told.

    Textual Inversion (Gal et al. 2022, arXiv 2208.01618, section 3) learns the embedding of a new word; here records
    hold what the text encoder made of a prompt, so the word is learned behind that encoder, and one for each layer, as
    in P+ (Voynov et al. 2023, arXiv 2303.09522, section 3.2). It is part of every prompt.

    Raises:
      ConfigError: the spec names targets, which this method has none of.
      UnsupportedModel: as for `cross_attentions`.
    """
    found = cross_attentions(model, spec).values()
    for attention in found:
        keys: Any = attention.to_k
        attention.add_module(CHILD, Concept(spec.rank, int(keys.in_features), next(attention.parameters()).device))
        attention.register_forward_pre_hook(_lengthened, with_kwargs=True)
    drawn = (attention.get_submodule(CHILD).get_parameter("tokens") for attention in found)
    copy_seeded(drawn, spec.seed, lambda tensor, generator: nn.init.normal_(tensor, 0.0, SPREAD, generator))
    train_only(model, lambda name: f".{CHILD}." in f".{name}")
    return model


def _lengthened(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook; a module-level function, so that a deep copy of the model uses its own tokens."""
    states, mask = told(kwargs)
    longer = attention.get_submodule(CHILD)(states)
    if mask is not None:
        mask = torch.cat([mask, mask.new_zeros(len(mask), 1, longer.shape[1] - states.shape[1])], dim=2)
    return args, {**kwargs, "encoder_hidden_states": longer, "attention_mask": mask}
