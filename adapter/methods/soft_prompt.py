"""Learned tokens in front of the hidden states of a block, removed again after the block."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from offsite.adapter.inject import OWN, copy_seeded, train_only
from offsite.adapter.options import Option, resolve
from offsite.adapter.prompted_call import named_arguments, prompted
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import hidden_size, in_slots
from offsite.errors import ConfigError, UnsupportedModel

CHILD = f"{OWN}prompt"
SPREAD = 0.02  # standard deviation of the initial values, as for a transformer's embeddings
OPTIONS = (Option("depth", "deep", choices=("deep", "shallow")),)


class SoftPrompt(nn.Module):
    """Tokens that are prepended to every example; each example has its own copy, and so its own gradient."""

    def __init__(self, tokens: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(tokens, width, dtype=torch.float32, device=device))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns hidden states (B, tokens + T, width) for hidden states (B, T, width), same dtype."""
        return torch.cat([self.tokens.to(hidden.dtype).expand(len(hidden), -1, -1), hidden], dim=1)


def attach_soft_prompt(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Prepends rank learned tokens to the input of each slot's block, or of the first slot's with depth "shallow".

    Jia et al. 2022 (VPT), arXiv 2203.12119, section 3.2; for text Lester et al. 2021, arXiv 2104.08691, section 2.
    The tokens have no position, and real tokens keep their positions. The output with a new adapter always differs from
    the plain model's, because attention sees the tokens.

    Raises:
      ConfigError: the spec names targets.
    """
    if spec.targets:
        raise ConfigError(f"targets={spec.targets!r}, method 'soft_prompt' sits before blocks; leave targets empty")
    depth = resolve(spec.options, OPTIONS, spec.method)["depth"]
    in_slots(model, spec.slots, lambda module: True)
    paths: Sequence[str] = spec.slots if depth == "deep" else spec.slots[:1]
    blocks = [model.get_submodule(path) for path in sorted(paths)]
    for block in blocks:
        prompt = SoftPrompt(spec.rank, hidden_size(block), next(block.parameters()).device)
        block.add_module(CHILD, prompt)
        block.register_forward_pre_hook(_prepend_tokens, with_kwargs=True)
        block.register_forward_hook(_remove_tokens)
    drawn = (block.get_submodule(CHILD).get_parameter("tokens") for block in blocks)
    copy_seeded(drawn, spec.seed, lambda tensor, generator: nn.init.normal_(tensor, 0.0, SPREAD, generator))
    train_only(model, lambda name: f".{CHILD}." in f".{name}")
    return model


def _prepend_tokens(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook; a module-level function, so that a deep copy of the model uses its own tokens."""
    hidden, others = named_arguments(block, args, kwargs)
    prompt = block.get_submodule(CHILD)
    extended = prompt(hidden)
    return (extended,), prompted(block, others, hidden.shape[1], extended.shape[1] - hidden.shape[1])


def _remove_tokens(block: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook that removes the tokens from the output of the block."""
    count = block.get_submodule(CHILD).get_parameter("tokens").shape[0]
    if isinstance(output, torch.Tensor):
        return output[:, count:]
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        longer = output[0].shape[1]
        if any(isinstance(other, torch.Tensor) and longer in other.shape[1:] for other in output[1:]):
            raise UnsupportedModel(
                f"a {type(block).__name__} hands more than hidden states to the next block, and a soft prompt makes "
                "the additional tensor too long; take method 'ffa_lora'"
            )
        return (output[0][:, count:], *output[1:])
    raise UnsupportedModel(
        f"block output={type(output).__name__}, a soft prompt needs a tensor or a tuple; take method 'ffa_lora'"
    )
