"""Bottleneck adapters: after each block, after both of its sublayers, or in parallel to its feed-forward part."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from offsite.adapter.inject import OWN, copy_seeded, train_only
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import hidden_size, in_slots, sublayers
from offsite.errors import ConfigError, UnsupportedModel

CHILD = f"{OWN}bottleneck"
TAP = f"{OWN}tap"


class Bottleneck(nn.Module):
    """hidden + scale * up(act(down(read))), computed in float32; up is zero at the start.

    Attributes:
      read: tensor (..., width) that the next forward pass reads in the place of `hidden`, or None; the tap of a
        parallel adapter sets it.
    """

    def __init__(self, width: int, rank: int, device: torch.device, scale: float = 1.0, act: Any = functional.gelu):
        super().__init__()
        make = nn.utils.skip_init  # no value is drawn here; `copy_seeded` fills the weights later
        self.down = make(nn.Linear, width, rank, device=device, dtype=torch.float32)
        self.up = make(nn.Linear, rank, width, device=device, dtype=torch.float32)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.scale, self.act = scale, act
        self.read: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the adapted hidden states, same shape (..., width) and dtype."""
        read, self.read = hidden if self.read is None else self.read, None
        update = self.up(self.act(self.down(read.to(self.down.weight.dtype))))
        return hidden + (self.scale * update).to(hidden.dtype)


class InputTap(nn.Module):
    """Hands the input of a layer to the parallel adapter."""

    def __init__(self, reader: Bottleneck) -> None:
        super().__init__()
        self._reader = (reader,)  # in a tuple: a reference, and not a child module with parameter names of its own

    def hand_over(self, hidden: torch.Tensor) -> None:
        """Keeps hidden states, (..., width), until the adapter's next forward pass."""
        self._reader[0].read = hidden


def attach_bottleneck(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Adds one bottleneck of width rank after each slot's block, that is after its feed-forward part and residual sum.

    Houlsby et al. 2019, arXiv 1902.00751, section 2.1; one for each block, as in Pfeiffer et al. 2021, arXiv
    2005.00247.

    Raises:
      ConfigError: the spec names targets.
    """
    blocks = slot_blocks(model, spec)
    places = {path: (block, hidden_size(block)) for path, block in blocks.items()}
    return _attach(model, spec, places)


def attach_houlsby(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Adds two bottlenecks of width rank to each block: after attention and after feed-forward, before the sums.

    Houlsby et al. 2019, arXiv 1902.00751, section 2.1.

    Raises:
      ConfigError: as for `attach_bottleneck`.
      UnsupportedModel: a block is not one attention and one feed-forward part.
    """
    places: dict[str, tuple[nn.Module, int]] = {}
    for path, block in slot_blocks(model, spec).items():
        paths = sublayers(block)
        width = hidden_size(block)
        places |= {f"{path}.{name}": (block.get_submodule(name), width) for name in (paths.attention, paths.writer)}
    return _attach(model, spec, places)


def attach_parallel(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Adds a bottleneck of width rank in parallel to each block's feed-forward part: same input, and outputs are added.

    The update is scaled by alpha / rank, and the non-linear function is ReLU. He et al. 2022, arXiv 2110.04366,
    section 4.5; for images AdaptFormer, Chen et al. 2022, arXiv 2205.13535, section 3.2.

    Raises:
      ConfigError: as for `attach_bottleneck`.
      UnsupportedModel: as for `attach_houlsby`.
    """
    blocks = slot_blocks(model, spec)
    paths = {path: sublayers(block) for path, block in blocks.items()}
    places = {
        f"{path}.{paths[path].writer}": (block.get_submodule(paths[path].writer), hidden_size(block))
        for path, block in blocks.items()
    }
    _attach(model, spec, places, scale=spec.alpha / spec.rank, act=functional.relu)
    for path, block in blocks.items():
        entry, leave = (block.get_submodule(name) for name in (paths[path].reader, paths[path].writer))
        adapter = leave.get_submodule(CHILD)
        if not isinstance(adapter, Bottleneck):
            raise TypeError("the adapter just added is not a Bottleneck")
        entry.add_module(TAP, InputTap(adapter))
        entry.register_forward_pre_hook(_hand_over_input)
    return model


def slot_blocks(model: nn.Module, spec: AdapterSpec) -> dict[str, nn.Module]:
    """Returns the slots' blocks by path, sorted.

    Raises:
      ConfigError: the spec names targets.
      UnsupportedModel: a slot is not a module of this model.
    """
    if spec.targets:
        raise ConfigError(f"targets={spec.targets!r}, method {spec.method!r} sits after blocks; leave targets empty")
    in_slots(model, spec.slots, lambda module: True)
    return {slot: model.get_submodule(slot) for slot in sorted(spec.slots)}


def _attach(model: nn.Module, spec: AdapterSpec, places: Mapping[str, tuple[nn.Module, int]], **form: Any) -> nn.Module:
    """Adds an adapter after each module, and draws the weights that are not zero in sorted order of the paths."""
    for module, width in places.values():
        module.add_module(CHILD, Bottleneck(width, spec.rank, next(module.parameters()).device, **form))
        module.register_forward_hook(_adapt_output)
    drawn = (places[path][0].get_submodule(CHILD).get_parameter("down.weight") for path in sorted(places))
    copy_seeded(drawn, spec.seed, _kaiming)
    train_only(model, lambda name: f".{CHILD}." in f".{name}")
    return model


def _kaiming(tensor: Any, generator: torch.Generator) -> Any:
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def _hand_over_input(layer: nn.Module, inputs: Any) -> None:
    """Forward pre-hook of the first dense layer of a feed-forward part."""
    layer.get_submodule(TAP).hand_over(inputs[0])


def _adapt_output(block: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook; a module-level function, so that a deep copy of the model uses its own adapter."""
    return adapted_output(output, block.get_submodule(CHILD))


def adapted_output(output: Any, adapter: nn.Module) -> Any:
    """Returns a block's output after an adapter has changed its hidden states, (..., width).

    Raises:
      UnsupportedModel: the output is neither a tensor nor a tuple that begins with a tensor.
    """
    if isinstance(output, torch.Tensor):
        return adapter(output)
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        return (adapter(output[0]), *output[1:])
    raise UnsupportedModel(
        f"block output={type(output).__name__}, a bottleneck needs a tensor or a tuple; take method 'ffa_lora'"
    )
