"""IP-Adapter: an image as a prompt, read by keys and values of its own in the slots' cross attentions."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from offsite.adapter.cross_attention import BLOCKED, cross_attentions, is_image, told
from offsite.adapter.inject import OWN, copy_seeded, train_only
from offsite.adapter.spec import AdapterSpec
from offsite.errors import UnsupportedModel

CHILD = f"{OWN}image"


class ImageMaps(nn.Module):
    """What an image's tokens are as keys, beside the frozen map of texts, and as values; up is zero at the start.

    Attributes:
      scale: of both, > 0.
    """

    def __init__(self, width: int, inner: int, rank: int, scale: float, device: torch.device) -> None:
        super().__init__()
        for name in ("keys", "values"):
            for part, reads, writes in (("down", width, rank), ("up", rank, inner)):
                # Nothing is drawn here: the seed's values come later.
                layer = nn.utils.skip_init(nn.Linear, reads, writes, bias=False, device=device, dtype=torch.float32)
                self.add_module(f"{name}_{part}", layer)
            nn.init.zeros_(self.get_submodule(f"{name}_up").get_parameter("weight"))
        self.scale = scale

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, in which everything here is computed."""
        return self.get_submodule("keys_up").get_parameter("weight").dtype

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what is added to keys, and values, each (B, S, inner), of (B, S, width), same dtype."""
        found = (
            self.get_submodule(f"{n}_up")(self.get_submodule(f"{n}_down")(states.to(self.dtype)))
            for n in ("keys", "values")
        )
        keys, values = ((self.scale * one).to(states.dtype) for one in found)
        return keys, values


def attach_ip_adapter(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Lets each cross attention in the slots look at an image's tokens apart from the text's, and adds what it sees.

    Ye et al. 2023, arXiv 2308.06721, section 3.2.2 (decoupled cross attention). There keys and values are whole
    matrices that start as the text's; here keys are the text's and a change of rank `rank` times alpha / rank, and
    values such a change of nothing, so that little travels and a new adapter changes no bit. What the paper's
    projection makes of an image stands in the records.

    Raises:
      ConfigError: the spec names targets, which this method has none of.
      UnsupportedModel: as for `cross_attentions`.
    """
    found = cross_attentions(model, spec)
    drawn = []
    for attention in found.values():
        keys: Any = attention.to_k
        sizes = (int(keys.in_features), int(keys.out_features), spec.rank, spec.alpha / spec.rank)
        maps = ImageMaps(*sizes, next(attention.parameters()).device)
        drawn += [maps.get_submodule(f"{name}_down").get_parameter("weight") for name in ("keys", "values")]
        attention.add_module(CHILD, maps)
        attention.register_forward_hook(_looked_at, with_kwargs=True)
    copy_seeded(
        drawn, spec.seed, lambda tensor, generator: nn.init.kaiming_uniform_(tensor, math.sqrt(5), generator=generator)
    )
    train_only(model, lambda name: f".{CHILD}." in f".{name}")
    return model


def _looked_at(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
    """Forward hook; a module-level function, so that a deep copy of the model uses its own maps.

    Raises:
      UnsupportedModel: no example has an image.
    """
    states, mask = told(kwargs)
    if mask is None:
        return output  # nothing is marked, as where a model is only tried
    image = is_image(mask)
    if len(image) and not image.any():  # a Poisson batch may be empty
        raise UnsupportedModel(
            "image tokens=0: method 'ip_adapter' needs them; take model.task 'image_prompt_to_image'"
        )
    more, values = attention.get_submodule(CHILD)(states)
    query, keys = attention.to_q(args[0]), attention.to_k(states) + more
    q, k, v = (one.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for one in (query, keys, values))
    unseen = torch.zeros_like(mask).masked_fill(~image[:, None], BLOCKED)
    seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=unseen[:, None])
    # A row without an image has looked at what is none.
    seen = seen.transpose(1, 2).flatten(2) * image.any(1)[:, None, None]
    return output + functional.linear(seen, attention.to_out[0].weight.to(seen.dtype))
