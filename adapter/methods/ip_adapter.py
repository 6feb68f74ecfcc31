"""IP-Adapter: an image as a prompt, which the slots' cross attentions read through keys and values of its own."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from offsite.adapter.cross_attention import BLOCKED, cross_attentions, is_image, states_and_mask
from offsite.adapter.inject import OWN, copy_seeded, train_only
from offsite.adapter.spec import AdapterSpec
from offsite.errors import UnsupportedModel

CHILD = f"{OWN}image"


class ImageMaps(nn.Module):
    """Low-rank maps from an image's tokens to values, and to a change of the text's keys; up is zero at the start.

    Attributes:
      scale: factor of both maps, > 0.
    """

    def __init__(self, width: int, inner: int, rank: int, scale: float, device: torch.device) -> None:
        super().__init__()
        for name in ("keys", "values"):
            for part, reads, writes in (("down", width, rank), ("up", rank, inner)):
                # No value is drawn here; `copy_seeded` fills the weights later.
                layer = nn.utils.skip_init(nn.Linear, reads, writes, bias=False, device=device, dtype=torch.float32)
                self.add_module(f"{name}_{part}", layer)
            nn.init.zeros_(self.get_submodule(f"{name}_up").get_parameter("weight"))
        self.scale = scale

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of all computation in this module."""
        return self.get_submodule("keys_up").get_parameter("weight").dtype

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the change of keys, and values, each (B, S, inner), for states (B, S, width), same dtype."""
        mapped = (
            self.get_submodule(f"{n}_up")(self.get_submodule(f"{n}_down")(states.to(self.dtype)))
            for n in ("keys", "values")
        )
        keys, values = ((self.scale * tensor).to(states.dtype) for tensor in mapped)
        return keys, values


def attach_ip_adapter(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Lets each cross attention in the slots attend to an image's tokens separately, and adds the result to its output.

    Ye et al. 2023, arXiv 2308.06721, section 3.2.2 (decoupled cross attention). The paper trains whole matrices for
    keys and values, which start as the text's. Here the keys are the text's keys plus a map of rank `rank` times alpha
    / rank, and the values are such a map alone, so that little travels and a new adapter changes no bit. The records
    hold the output of the paper's image projection.

    Raises:
      ConfigError: the spec names targets.
      UnsupportedModel: as for `cross_attentions`.
    """
    drawn = []
    for attention in cross_attentions(model, spec).values():
        keys: Any = attention.to_k
        sizes = (int(keys.in_features), int(keys.out_features), spec.rank, spec.alpha / spec.rank)
        maps = ImageMaps(*sizes, next(attention.parameters()).device)
        drawn += [maps.get_submodule(f"{name}_down").get_parameter("weight") for name in ("keys", "values")]
        attention.add_module(CHILD, maps)
        attention.register_forward_hook(_attend_to_image, with_kwargs=True)
    copy_seeded(
        drawn, spec.seed, lambda tensor, generator: nn.init.kaiming_uniform_(tensor, math.sqrt(5), generator=generator)
    )
    train_only(model, lambda name: f".{CHILD}." in f".{name}")
    return model


def _attend_to_image(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
) -> torch.Tensor:
    """Forward hook; a module-level function, so that a deep copy of the model uses its own maps.

    Raises:
      UnsupportedModel: no example of the batch has an image.
    """
    states, mask = states_and_mask(kwargs)
    if mask is None:
        return output  # no token is marked, as in a trial of the model
    image = is_image(mask)
    if len(image) and not image.any():  # a Poisson batch may be empty
        raise UnsupportedModel(
            "image tokens=0: method 'ip_adapter' needs image tokens; take model.task 'image_prompt_to_image'"
        )
    change, values = attention.get_submodule(CHILD)(states)
    query, keys = attention.to_q(args[0]), attention.to_k(states) + change
    q, k, v = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in (query, keys, values))
    unseen = torch.zeros_like(mask).masked_fill(~image[:, None], BLOCKED)
    seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=unseen[:, None])
    # A row without an image attended to tokens that are not an image; its result is set to zero.
    seen = seen.transpose(1, 2).flatten(2) * image.any(1)[:, None, None]
    return output + functional.linear(seen, attention.to_out[0].weight.to(seen.dtype))
