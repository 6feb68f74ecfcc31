"""Checks of a U-net's configuration: it must be a model of Stable Diffusion 1 or 2, of bounded size.

Most arguments of diffusers' class choose variants with other inputs; these arguments are fixed here. Lists are short
and hold plain values, and sizes are bounded, before anything is allocated.
"""

from collections.abc import Callable
from typing import Any

from offsite.errors import MalformedMessage, UnsupportedModel

MAX_LEVELS = 8  # Stable Diffusion has 4
MAX_LAYERS = 16  # layers in one level, or transformer blocks in one layer
MAX_CHANNELS = 4096  # Stable Diffusion has 1280 at most
MAX_WIDTH = 16384  # width of a text; Stable Diffusion has 768 or 1024
MAX_SIDE = 256  # side of the latents; Stable Diffusion has 64 or 96
MAX_ENTRIES = 1 << 26  # entries of the largest map, (side, side, channels)
DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
UP = ("CrossAttnUpBlock2D", "UpBlock2D")
MIDDLE = ("UNetMidBlock2DCrossAttn",)
# Each of these arguments must have Stable Diffusion's value, or be absent.
FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}


def check_unet(values: dict[str, Any]) -> None:
    """Refuses a configuration of another kind of U-net, and one of no honest size.

    Args:
      values: arguments of `UNet2DConditionModel` by name; the class knows every name.

    Raises:
      UnsupportedModel: a fixed argument has another value.
      MalformedMessage: an argument is not of its type, a list is too long, or a size is out of range.
    """
    for key, wanted in FIXED.items():
        value = values.get(key, wanted)
        # 1 and 1.0 are one value here, True is another.
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            raise UnsupportedModel(f"config {key}={value!r}: a U-net must have {wanted!r}; use another model")
    for key, value in values.items():
        if key not in FIXED:
            _check(key, value)
    levels = {key: len(values[key]) for key in _LEVELS if isinstance(values.get(key), list)}
    if len(set(levels.values())) > 1:
        raise MalformedMessage(f"config {levels}: each must have one entry for each level; refuse this package")
    channels = values.get("block_out_channels", [0])
    if (values.get("sample_size") or 0) ** 2 * max(channels) > MAX_ENTRIES:
        raise MalformedMessage(
            f"config sample_size={values['sample_size']} block_out_channels={channels}: no honest model has maps of "
            f"over {MAX_ENTRIES} entries; refuse this package"
        )


def _whole(minimum: int, maximum: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and minimum <= value <= maximum


def _each(single: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Allows a single value, or a list with a value for each level."""
    return lambda value: single(value) or _list(single)(value)


def _list(single: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and 0 < len(value) <= MAX_LEVELS and all(map(single, value))


def _one_of(*known: Any) -> Callable[[Any], bool]:
    return lambda value: type(value) in {type(allowed) for allowed in known} and value in known


_number = (int, float)
_LEVELS = [
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "transformer_layers_per_block",
]
_RULES: dict[str, Callable[[Any], bool]] = {
    "sample_size": _whole(1, MAX_SIDE),
    "in_channels": _whole(1, MAX_CHANNELS),
    "out_channels": _whole(1, MAX_CHANNELS),
    "flip_sin_to_cos": _one_of(True, False),
    "freq_shift": _whole(0, 1),
    "down_block_types": _list(_one_of(*DOWN)),
    "mid_block_type": _one_of(*MIDDLE),
    "up_block_types": _list(_one_of(*UP)),
    "block_out_channels": _list(_whole(1, MAX_CHANNELS)),
    "layers_per_block": _each(_whole(1, MAX_LAYERS)),
    "dropout": lambda value: type(value) in _number and 0 <= value <= 0.5,
    "act_fn": _one_of("silu", "swish", "mish", "gelu"),
    "norm_num_groups": _whole(1, MAX_CHANNELS),
    "norm_eps": lambda value: type(value) in _number and 0 < value <= 1e-2,
    "cross_attention_dim": _whole(1, MAX_WIDTH),
    "transformer_layers_per_block": _each(_whole(1, MAX_LAYERS)),
    "attention_head_dim": _each(_whole(1, MAX_CHANNELS)),
    "num_attention_heads": lambda value: value is None or _each(_whole(1, MAX_CHANNELS))(value),
    "use_linear_projection": _one_of(True, False),
    "upcast_attention": _one_of(True, False),
    "resnet_time_scale_shift": _one_of("default", "scale_shift"),
}


def _check(key: str, value: Any) -> None:
    if key not in _RULES or not _RULES[key](value):
        raise MalformedMessage(
            f"config {key}={str(value)[:80]!r}: no U-net of Stable Diffusion has this value; refuse this package"
        )
