"""CLIP-Adapter: a small network after CLIP's image projection, and optionally after its text projection."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from offsite.adapter.inject import copy_seeded, train_only
from offsite.adapter.options import Option
from offsite.adapter.side_modules import SIDE_MODULE, add_sequential, is_side_module, shallow_clone_at
from offsite.adapter.spec import AdapterSpec
from offsite.errors import ConfigError, UnsupportedModel

IMAGE, TEXT = "visual_projection", "text_projection"  # transformers' names
RATIO, WITH_TEXT = Option("ratio", 0.2, 0.01, 0.99), Option("text", False)
OPTIONS = (RATIO, WITH_TEXT)


class FeatureAdapter(nn.Module):
    """The update of a feature: scale * up(relu(down(feature))), in float32, without biases; up is zero at the start.

    Args:
      width: length of a feature, >= 1.
      rank: inner width, >= 1.
      scale: factor of the update, > 0.
      device: device of the weights.
    """

    def __init__(self, width: int, rank: int, scale: float, device: torch.device) -> None:
        super().__init__()
        make = nn.utils.skip_init  # no value is drawn here; `copy_seeded` fills the weights later
        self.down = make(nn.Linear, width, rank, bias=False, device=device, dtype=torch.float32)
        self.up = make(nn.Linear, rank, width, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)
        self._scale = scale

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """Returns the update, float32 (..., width), of a feature (..., width)."""
        update: torch.Tensor = self.up(functional.relu(self.down(feature)))
        return self._scale * update


def attach_clip_adapter(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Trains two dense layers of inner width rank after the image projection, and with option `text` after the text's.

    Gao et al. 2021, arXiv 2110.04544, section 3.2: a feature f becomes a A(f) + (1 - a) f, with a the option `ratio`.
    CLIP divides features by their length, so f + a / (1 - a) A(f), which points the same way, gives the same
    likelihoods; and while A is zero, this form is f to the last bit. The adapter is not in the spec's slots.

    Raises:
      ConfigError: the spec names targets.
      UnsupportedModel: as for `projections`.
    """
    if spec.targets:
        raise ConfigError(
            f"targets={spec.targets!r}, method 'clip_adapter' sits after CLIP's projections; leave targets empty"
        )
    ratio = float(RATIO.read(dict(spec.options).get(RATIO.name, RATIO.default), spec.method))
    drawn = []
    for path in projections(model, spec):
        layer = shallow_clone_at(model, path)
        weight = layer.get_parameter("weight")
        add_sequential(layer, FeatureAdapter(len(weight), spec.rank, ratio / (1 - ratio), weight.device))
        drawn.append(layer.get_parameter(f"{SIDE_MODULE}.down.weight"))
    copy_seeded(drawn, spec.seed, _kaiming)
    train_only(model, is_side_module)
    return model


def projections(model: nn.Module, spec: AdapterSpec) -> tuple[str, ...]:
    """Returns the paths of the projections that get an adapter: the image's, and with option `text` also the text's.

    Raises:
      ConfigError: the option is not true or false.
      UnsupportedModel: the model is not CLIP.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", "") != "clip" or not all(hasattr(model, path) for path in (IMAGE, TEXT)):
        raise UnsupportedModel(
            f"model={type(model).__name__}: method 'clip_adapter' needs CLIP with its two projections; "
            "take method 'bottleneck'"
        )
    with_text = WITH_TEXT.read(dict(spec.options).get(WITH_TEXT.name, WITH_TEXT.default), spec.method)
    return (IMAGE, TEXT) if with_text else (IMAGE,)


def _kaiming(tensor: Any, generator: torch.Generator) -> Any:
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
