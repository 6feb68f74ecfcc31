"""Denoisers of diffusers, an optional extra: rebuilt from their configuration by the same rules as other models.

Denoisers have neither a transformers configuration nor an auto class; this module has both. The class that a
configuration names is looked up in a table of classes whose blocks and inputs are known.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offsite.emulator.structure.unet_config import check_unet
from offsite.errors import MalformedMessage, OffsiteError
from offsite.task.diffusion_models import CLASS as CLASS
from offsite.task.diffusion_models import UNET, model_class

MAX_ENTRIES = 1 << 26  # entries of the computed table of positions; the largest published table has some millions
STEPS = 1000  # steps of noise in every published diffusion transformer
TOKENS = 12  # tokens of a random text
_SIZES = ("sample_size", "patch_size", "num_attention_heads", "attention_head_dim")


@dataclass(frozen=True)
class DiffusionConfig:
    """The configuration of one denoiser.

    Attributes:
      name: name of the denoiser's class.
      values: plain arguments of the class, by name.
    """

    name: str
    values: dict[str, Any]


class AutoDiffusion:
    """Builds a denoiser from its configuration, as the auto classes of transformers do."""

    _model_mapping: ClassVar[
        dict[type, type]
    ] = {}  # transformers' auto classes list their configurations here; diffusers has none

    @staticmethod
    def from_config(config: Any, *, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
        """Returns a model of a configuration, parameters in `dtype` and tables float32, as `from_pretrained` does.

        Raises:
          ValueError: the configuration is not a `DiffusionConfig`, or remote code is asked for.
          UnsupportedModel: diffusers is not installed, or the class is not in the table.
          MalformedMessage: the class has no such argument, or refuses an argument's value.
        """
        if not isinstance(config, DiffusionConfig) or trust_remote_code:
            raise ValueError("not a configuration of diffusers, or one with code")
        kind = model_class(config.name)
        _check_values(config, inspect.signature(kind.__init__).parameters.keys() - {"self"})
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model: nn.Module = kind(**config.values)
        except (OffsiteError, MemoryError):
            raise
        except Exception as error:  # a class of diffusers may raise any error for an argument
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise MalformedMessage(
                f"config.json: {config.name} refuses its arguments ({reason}); refuse this package"
            ) from error
        finally:
            torch.set_default_dtype(previous)
        return model


def is_diffusion(model: nn.Module) -> bool:
    """Returns whether a model is one of diffusers, without loading diffusers, which takes seconds."""
    return type(model).__module__.partition(".")[0] == "diffusers"


def to_document(model: Any) -> dict[str, Any]:
    """Returns the configuration of a model of diffusers as plain values that `parse` takes.

    Raises:
      UnsupportedModel: diffusers is not installed, or the class is not in the table.
    """
    name = type(model).__name__
    model_class(name)
    return {CLASS: name, **{key: _plain(value) for key, value in dict(model.config).items() if key[:1] != "_"}}


def parse(document: dict[str, Any]) -> DiffusionConfig:
    """Returns the configuration of a document."""
    return DiffusionConfig(str(document[CLASS]), {key: value for key, value in document.items() if key != CLASS})


def random_inputs(model: Any, generator: torch.Generator, examples: int) -> dict[str, Tensor]:
    """Returns random latents, each with a step of noise and a condition, a class or a text, by argument name."""
    config = model.config
    shape = (examples, config.in_channels, config.sample_size, config.sample_size)
    latents = "sample" if type(model).__name__ == UNET else "hidden_states"
    return {
        latents: torch.randn(shape, generator=generator),
        "timestep": torch.randint(STEPS, (examples,), generator=generator),
        **_CONDITIONS[type(model).__name__](config, generator, examples),
    }


def _class(config: Any, generator: torch.Generator, examples: int) -> dict[str, Tensor]:
    return {"class_labels": torch.randint(config.num_embeds_ada_norm, (examples,), generator=generator)}


def _text(config: Any, generator: torch.Generator, examples: int) -> dict[str, Tensor]:
    width = getattr(config, "caption_channels", None) or config.cross_attention_dim
    return {"encoder_hidden_states": torch.randn((examples, TOKENS, width), generator=generator)}


_CONDITIONS: dict[str, Callable[[Any, torch.Generator, int], dict[str, Tensor]]] = {
    "DiTTransformer2DModel": _class,
    "PixArtTransformer2DModel": _text,
    UNET: _text,
}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _check_values(config: DiffusionConfig, known: set[str]) -> None:
    values = config.values
    if strange := sorted(values.keys() - known):
        raise MalformedMessage(f"config {strange[0]}: the model's class has no such argument; refuse this package")
    if config.name == UNET:
        check_unet(values)
        return
    for key, value in values.items():
        if type(value) not in (bool, int, float, str, type(None)):
            raise MalformedMessage(f"config {key}={value!r}: it must be one plain value; refuse this package")
    size, patch, heads, width = (values.get(key, 1) for key in _SIZES)
    if any(type(number) is not int or number < 1 for number in (size, patch, heads, width)):
        raise MalformedMessage(f"config {', '.join(_SIZES)}: each must be at least 1; refuse this package")
    if (size // patch) ** 2 * heads * width > MAX_ENTRIES:
        raise MalformedMessage(
            f"config sample_size={size}: no honest model computes over {MAX_ENTRIES} positions; refuse this package"
        )
