"""Auxiliary tensors: frozen inputs of an adapter that do not follow from its spec, and so travel beside the spec."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from offsite.adapter.inject import seeded
from offsite.adapter.spec import AdapterSpec
from offsite.errors import MalformedMessage

AuxiliaryTensors = Mapping[str, Tensor]
NO_AUXILIARY: AuxiliaryTensors = MappingProxyType({})
MAX_LENGTH = 4096  # of a dimension whose length the sender chooses
DUMMY_SCALE = 0.1


@dataclass(frozen=True)
class TensorSpec:
    """The shape and dtype of one auxiliary tensor.

    Attributes:
      shape: lengths of the dimensions; a word stands for a length in 1..`MAX_LENGTH` that the sender chooses, and for
        the same length in all tensors of the adapter.
      dtype: float32 for values, int32 or int64 for positions.
      below: upper bound, excluded, of positions, which ascend from 0 without repetition; 0 for values.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32
    below: int = 0


RequiredTensors = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class AuxiliarySpec:
    """What a method needs to know about its auxiliary tensors.

    Attributes:
      required: function from a model, before or after `attach`, and a spec to the tensors that the adapter needs; an
        empty mapping where the spec's options need no tensor.
      attach: the method's own `attach` with checked tensors as its third argument.
      hint: advice for messages on how to get the tensors.
      frozen_count: function from a spec to the number of earlier bottleneck adapters that the tensors hold.
    """

    required: Callable[[nn.Module, AdapterSpec], RequiredTensors]
    attach: Callable[[nn.Module, AdapterSpec, AuxiliaryTensors], nn.Module]
    hint: str
    frozen_count: Callable[[AdapterSpec], int] = field(default=lambda spec: 0)


def positions(count: int, entries: int) -> TensorSpec:
    """Returns the spec of `count` positions in a flattened matrix of `entries` entries."""
    narrow = entries <= torch.iinfo(torch.int32).max
    return TensorSpec((count,), torch.int32 if narrow else torch.int64, below=entries)


def check_auxiliary(required: RequiredTensors, tensors: AuxiliaryTensors, *, hint: str) -> None:
    """Refuses tensors that differ in any way from the required tensors, because their sender is not trusted.

    Args:
      required: the specs of all tensors that the adapter needs, by name.
      tensors: the tensors that the sender gave, by name.
      hint: advice that ends each message.

    Raises:
      MalformedMessage: a tensor is missing or superfluous, has another shape or dtype, is not finite, or is not an
        ascending list of positions.
    """
    if different := sorted(required.keys() ^ tensors.keys()):
        rule = "is missing" if different[0] in required else "has no use here"
        raise MalformedMessage(f"auxiliary tensor={different[0]!r} {rule}: {hint}")
    lengths: dict[str, int] = {}
    for name, spec in required.items():
        tensor, label = tensors[name], f"auxiliary tensor={name!r}"
        if tensor.dtype != spec.dtype or not _fits(tuple(tensor.shape), spec, lengths):
            shape = tuple(lengths.get(length, length) if isinstance(length, str) else length for length in spec.shape)
            raise MalformedMessage(
                f"{label} is {tensor.dtype} {tuple(tensor.shape)}, must be {spec.dtype} {shape}: {hint}"
            )
        if spec.below and not _ascending(tensor, spec.below):
            raise MalformedMessage(f"{label} must be ascending positions in 0..{spec.below - 1}: {hint}")
        if not spec.below and not torch.isfinite(tensor).all():
            raise MalformedMessage(f"{label} holds NaN or Inf, must be finite: {hint}")


def dummy_tensors_for(required: RequiredTensors, *, free: int, seed: int) -> dict[str, Tensor]:
    """Returns random tensors for a trial of a method; the values depend on the seed and the shapes alone.

    Args:
      required: the specs of the method's tensors, by name.
      free: value of every length that a sender may choose, >= 1.
      seed: public seed of the values.
    """
    generator = seeded(seed)
    return {name: _random_tensor(required[name], free, generator) for name in sorted(required)}


def _random_tensor(spec: TensorSpec, free: int, generator: torch.Generator) -> Tensor:
    shape = [free if isinstance(length, str) else length for length in spec.shape]
    if spec.below:
        chosen = torch.randperm(spec.below, generator=generator)[: math.prod(shape)]
        return chosen.sort().values.to(spec.dtype)
    return DUMMY_SCALE * torch.randn(shape, generator=generator)


def _fits(shape: tuple[int, ...], spec: TensorSpec, lengths: dict[str, int]) -> bool:
    if len(shape) != len(spec.shape):
        return False
    for actual, length in zip(shape, spec.shape, strict=True):
        chosen = isinstance(length, str) and 1 <= actual <= MAX_LENGTH
        if actual != (lengths.setdefault(str(length), actual) if chosen else length):
            return False
    return True


def _ascending(tensor: Tensor, below: int) -> bool:
    steps = tensor[1:] > tensor[:-1]  # a comparison and not a difference, which could wrap
    return bool(steps.all()) and int(tensor[0]) >= 0 and int(tensor[-1]) < below
