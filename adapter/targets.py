"""Finds the modules of a model's slots that a method tunes, by structure and full name."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from offsite.adapter.spec import AdapterSpec
from offsite.errors import ConfigError, UnsupportedModel, nearest

Found = dict[str, nn.Module]
# Names of the query and value layers, for models that are in no table of peft.
ATTENTION = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "c_attn", "query_key_value", "Wqkv", "qkv")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a dense layer: `nn.Linear`, or GPT-2's transposed `Conv1D`."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is an affine LayerNorm or RMSNorm of any class: a vector `weight`, at most a vector `bias`."""
    own = dict(module.named_parameters())
    named = "norm" in type(module).__name__.lower()
    return named and "weight" in own and set(own) <= {"weight", "bias"} and all(p.ndim == 1 for p in own.values())


def has_bias(module: nn.Module) -> bool:
    """Whether a module adds a `bias` of its own to its output."""
    return (is_linear(module) or is_norm(module)) and getattr(module, "bias", None) is not None


def in_slots(model: nn.Module, slots: Sequence[str], keep: Callable[[nn.Module], bool]) -> Found:
    """Returns the modules inside the slots that `keep` accepts, by full name, sorted.

    Raises:
      ConfigError: there are no slots.
      UnsupportedModel: a slot is not a module of this model.
    """
    if not slots:
        raise ConfigError("slots=() must name at least one block; take them from the geometry")
    modules = dict(model.named_modules())
    for slot in slots:
        if slot not in modules:
            hint = nearest(slot, [name for name in modules if name.count(".") == slot.count(".")] or list(modules)[:20])
            raise UnsupportedModel(f"slot={slot!r} is not a module of this model; {hint}")
    names = (name for name in modules if any(name == slot or name.startswith(f"{slot}.") for slot in slots))
    return {name: modules[name] for name in sorted(names) if keep(modules[name])}


def leaf_names(names: Iterable[str]) -> list[str]:
    """Returns the last parts of module paths, sorted, without repetition."""
    return sorted({name.rpartition(".")[2] for name in names})


def default_targets(model: nn.Module, table: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """Returns the entry of a table for the model's type, or () where the table has no entry."""
    return table.get(str(getattr(getattr(model, "config", None), "model_type", "")), ())


def matches(name: str, targets: Sequence[str]) -> bool:
    """Whether a full module name matches the targets: a regular expression, or names that equal its last parts."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def choose(candidates: Found, spec: AdapterSpec, defaults: Sequence[str]) -> Found:
    """Returns the candidates that match the spec's targets, or else the method's defaults, or else `ATTENTION`.

    Args:
      candidates: modules in the slots that the method can tune, by full name.
      spec: the spec of the adapter.
      defaults: the method's default targets for the model.

    Raises:
      UnsupportedModel: a target matches no candidate; the message lists the leaf names, or the nearest of them.
    """
    leaves = leaf_names(candidates)
    for target in spec.targets:
        if not any(matches(name, [target]) for name in candidates):
            raise UnsupportedModel(f"target={target!r} is not a module in the slots; {nearest(target, leaves)}")
    for targets in (spec.targets,) if spec.targets else (defaults, ATTENTION):
        if chosen := {name: module for name, module in candidates.items() if matches(name, targets)}:
            return chosen
    raise UnsupportedModel(
        f"method={spec.method!r} has no default targets for this model; set targets from: {', '.join(leaves)}"
    )


def hidden_size(block: nn.Module) -> int:
    """Returns the width of a block's hidden states: the length that most of its dense layers read or write.

    Of two equally frequent lengths, the width is the input length of the first dense layer.

    Raises:
      UnsupportedModel: the block has no dense layer.
    """
    sizes: Counter[int] = Counter()
    for module in block.modules():
        if is_linear(module):
            lengths = [int(length) for length in module.weight.shape]
            sizes.update(reversed(lengths) if isinstance(module, nn.Linear) else lengths)
    if not sizes:
        raise UnsupportedModel("dense layers=0 in a slot's block, so its width is unknown; choose another method")
    return sizes.most_common(1)[0][0]


@dataclass(frozen=True)
class Sublayers:
    """The paths of the dense layers at which the two sublayers of a block begin and end, inside the block.

    Attributes:
      attention: last dense layer of attention, which writes hidden states.
      reader: first dense layer of the feed-forward part, which reads hidden states.
      writer: last dense layer of the feed-forward part, which writes hidden states.
    """

    attention: str
    reader: str
    writer: str


def sublayers(block: nn.Module) -> Sublayers:
    """Returns the sublayers of a transformer block, by structure.

    A sublayer ends where the last dense layer of a direct child of the block writes the block's width. There must be
    two such ends, of attention first. After attention, the feed-forward part begins at the first dense layer that reads
    the block's width.

    Raises:
      UnsupportedModel: the block has another structure.
    """
    if any(isinstance(module, (nn.ModuleList, nn.ModuleDict)) for module in block.modules()):
        raise UnsupportedModel(
            f"a {type(block).__name__} holds a list of layers, for example of experts, must be attention and "
            "feed-forward; take method 'bottleneck'"
        )
    width = hidden_size(block)
    dense = [(name, *lengths(module)) for name, module in block.named_modules() if is_linear(module)]
    last = {name.partition(".")[0]: (name, writes) for name, _, writes in dense}
    ends = [name for name, writes in last.values() if writes == width]
    if len(ends) != 2:
        raise UnsupportedModel(
            f"sublayers={len(ends)} of a {type(block).__name__} write its width {width}, must be attention and "
            "feed-forward; take method 'bottleneck'"
        )
    names = [name for name, _, _ in dense]
    after_attention = dense[names.index(ends[0]) + 1 :]
    return Sublayers(ends[0], next(name for name, reads, _ in after_attention if reads == width), ends[1])


def lengths(module: nn.Module) -> tuple[int, int]:
    """Returns the number of features that a dense layer reads, and the number that it writes."""
    first, second = (int(length) for length in module.weight.shape)
    return (second, first) if isinstance(module, nn.Linear) else (first, second)
