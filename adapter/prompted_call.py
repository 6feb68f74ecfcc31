"""Extends the arguments of a block's forward pass by learned tokens in front of its hidden states."""

import inspect
from typing import Any

import torch
from torch import nn

from offsite.errors import UnsupportedModel


def named_arguments(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Returns the hidden states of a block's call, (B, T, width), and all other arguments by name.

    Raises:
      UnsupportedModel: the first argument is not a tensor of three dimensions.
    """
    bound = inspect.signature(block.forward).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    hidden = named.pop(next(iter(bound.signature.parameters)), None)
    if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
        raise UnsupportedModel(
            f"a {type(block).__name__} does not read hidden states (B, T, width) first; take method 'ffa_lora'"
        )
    return hidden, named


def prompted(block: nn.Module, arguments: dict[str, Any], length: int, count: int) -> dict[str, Any]:
    """Returns a block's arguments for a sequence with `count` learned tokens in front of its `length` real tokens.

    A real token attends to every learned token, and to the same real tokens as before. Learned tokens attend only to
    each other, and their outputs are dropped after the block, so they cannot carry a hidden real token to another.

    Args:
      block: the block, for messages and for the index of its cache.
      arguments: the arguments of the call by name, without the hidden states.
      length: number of real tokens, >= 1.
      count: number of learned tokens, >= 1.

    Raises:
      UnsupportedModel: an argument with a tensor is not known here, or the cache holds keys of earlier calls.
    """
    extended: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == "attention_mask" and isinstance(value, torch.Tensor):
            extended[name] = _mask(value, length, count)
        elif name == "position_ids" and isinstance(value, torch.Tensor):
            extended[name] = torch.cat([value.new_zeros((*value.shape[:-1], count)), value], dim=-1)
        elif name == "position_embeddings" and isinstance(value, tuple) and len(value) == 2:
            extended[name] = (_front(value[0], count, 1.0), _front(value[1], count, 0.0))
        elif name == "encoder_attention_mask" and isinstance(value, torch.Tensor):
            extended[name] = _cross_mask(value, length, count)
        elif name == "past_key_values" and value is not None:
            extended[name] = _empty(block, value)
        elif _holds_tensor(value) and name != "encoder_hidden_states":  # these belong to another sequence
            raise UnsupportedModel(
                f"argument={name!r} of a {type(block).__name__} cannot be extended by learned tokens; take method "
                "'ffa_lora'"
            )
        else:
            extended[name] = value
    return extended


def _front(table: torch.Tensor, count: int, value: float) -> torch.Tensor:
    """Returns a rotary table (..., T, d) with rows of one value in front: cosine 1 and sine 0 rotate nothing."""
    return torch.cat([table.new_full((*table.shape[:-2], count, table.shape[-1]), value), table], dim=-2)


def _mask(mask: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """Returns an attention mask, boolean or additive, (B, T) or (B, heads, 1 or T, T), for the longer sequence."""
    seen, unseen = (0.0, torch.finfo(mask.dtype).min) if mask.is_floating_point() else (1, 0)
    if mask.ndim == 2 and mask.shape[1] == length:
        return torch.cat([mask.new_ones((len(mask), count)), mask], dim=1)
    if mask.ndim != 4 or mask.shape[3] != length or mask.shape[2] not in (1, length):
        raise UnsupportedModel(
            f"attention mask shape={tuple(mask.shape)} for {length} tokens must be (B, T) or (B, heads, 1 or T, T); "
            "take method 'ffa_lora'"
        )
    below = torch.cat([mask.new_full((*mask.shape[:3], count), seen), mask], dim=3)
    if mask.shape[2] == 1 < length:
        return below  # one row of the mask serves all tokens
    left = mask.new_full((*mask.shape[:2], count, count), seen)
    right = mask.new_full((*mask.shape[:2], count, length), unseen)
    return torch.cat([torch.cat([left, right], dim=3), below], dim=2)


def _cross_mask(mask: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """Returns the mask of another sequence, (B, S) or (B, heads, 1 or T, S), with rows for `count` more tokens."""
    if mask.ndim != 4 or mask.shape[2] != length:
        return mask  # one row of the mask serves all tokens
    return torch.cat([mask[:, :, :1].expand(-1, -1, count, -1), mask], dim=2)


def _empty(block: nn.Module, cache: Any) -> Any:
    """Returns a cache after a check that it holds no keys of this block.

    Raises:
      UnsupportedModel: the cache holds keys of this block, so the learned tokens would enter the cache twice.
    """
    indices = (getattr(module, "layer_idx", None) for module in block.modules())
    index = next((number for number in indices if isinstance(number, int)), 0)
    if int(cache.get_seq_length(index)) > 0:
        raise UnsupportedModel("use_cache=True: a model with soft prompts generates without a cache; set it to False")
    return cache


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return _holds_tensor(list(value.values()))
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, torch.Tensor)
