"""Random inputs for vetting, of the kind that a model takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offsite.emulator.structure import denoisers
from offsite.errors import UnsupportedModel
from offsite.task.device import device_of
from offsite.task.model_fit import most_positions
from offsite.task.number_format import dtype_of

EXAMPLES, LENGTH = 8, 32
Inputs = dict[str, Tensor]


def random_inputs(model: Any, generator: torch.Generator) -> Inputs:
    """Returns 8 random inputs of the model's kind, by argument: up to 32 ordinary tokens, an image of noise, or both.

    Raises:
      UnsupportedModel: the model takes another kind of input.
    """
    device = device_of(model)  # the numbers are drawn on the CPU, so that every device gets the same
    inputs = {name: value.to(device) for name, value in _inputs(model, generator).items()}
    return {name: value.to(dtype_of(model)) if value.is_floating_point() else value for name, value in inputs.items()}


def _inputs(model: Any, generator: torch.Generator) -> Inputs:
    if denoisers.is_diffusion(model):
        return denoisers.random_inputs(model, generator, EXAMPLES)
    kind = getattr(model, "main_input_name", "")
    if kind == "pixel_values":
        return {kind: _images(model.config, generator)}
    if kind != "input_ids":
        raise UnsupportedModel(
            f"main_input_name={kind!r}: vetting knows no random input of this kind; use another model"
        )
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        names = ("input_ids", "decoder_input_ids") if model.config.is_encoder_decoder else ("input_ids",)
        return {name: _tokens(model, generator) for name in names}
    pixels = _images(vision, generator)
    return {"input_ids": _beside_images(model, _tokens(model, generator), pixels), "pixel_values": pixels}


@contextmanager
def no_lasting_hooks(model: nn.Module) -> Iterator[None]:
    """Removes the hooks that transformers adds for good when hidden states are first asked for, as LLaVA does."""
    before = {module: (set(module._forward_hooks), set(vars(module))) for module in model.modules()}
    try:
        yield
    finally:
        for module, (hooks, names) in before.items():
            for key in module._forward_hooks.keys() - hooks:
                del module._forward_hooks[key]
            for name in vars(module).keys() - names:
                delattr(module, name)


def _tokens(model: Any, generator: torch.Generator) -> Tensor:
    config, text = model.config, model.config.get_text_config()
    settings = {**vars(config), **vars(text)}
    values = [value for key, value in settings.items() if key.endswith(("_token_id", "_token_index"))]
    special = {token for value in values for token in (value if isinstance(value, list | tuple) else (value,))}
    ordinary = torch.tensor([i for i in range(text.vocab_size) if i not in special])
    length = min(LENGTH, most_positions(model) or LENGTH)
    if len(ordinary) < 2:
        raise UnsupportedModel(f"vocab_size={text.vocab_size}: fewer than two ordinary tokens; use another model")
    return ordinary[torch.randint(len(ordinary), (EXAMPLES, length), generator=generator)]


def _images(config: Any, generator: torch.Generator) -> Tensor:
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if size is None or channels is None:
        raise UnsupportedModel(f"image_size={size} num_channels={channels}: vetting needs both; use another model")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(EXAMPLES, channels, height, width, generator=generator)


def _beside_images(model: Any, ids: Tensor, pixels: Tensor) -> Tensor:
    """Returns the tokens with a placeholder for each feature of an image in their middle, or with an end token.

    The placeholders stand in the middle, so that the first half has tokens to change and the second half has tokens
    that must move. Two towers side by side have no placeholder: the tower of texts is read at the end token.
    """
    text = model.config.get_text_config()
    holder = getattr(model.config, "image_token_id", getattr(model.config, "image_token_index", None))
    if holder is None:
        end = getattr(text, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < text.vocab_size:
            ids[:, -1] = end
        return ids
    try:
        with torch.no_grad(), no_lasting_hooks(model):
            output = model.get_image_features(pixel_values=pixels[:1].to(device_of(model), dtype_of(model)))
        features: Tensor = getattr(output, "pooler_output", output)[0]
        count = features.shape[-2]
    except Exception as error:  # families whose images come in tiles or grids, and hostile configurations
        raise UnsupportedModel(
            f"vetting model={type(model).__name__}: it gives no features for a plain image ({type(error).__name__}); "
            "use a model that takes input_ids and pixel_values alone"
        ) from error
    half = ids.shape[1] // 2
    return torch.cat([ids[:, :half], torch.full((EXAMPLES, count), holder), ids[:, half:]], 1)
