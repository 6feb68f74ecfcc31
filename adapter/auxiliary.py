"""Auxiliary tensors: an adapter needs them, does not train them and cannot make them up; they come beside its spec."""

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
MAX_LENGTH = 4096  # of a dimension that the sender chooses
INVENTED_SCALE = 0.1


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a method takes.

    Attributes:
      shape: its lengths; a word stands for a length of 1 to `MAX_LENGTH` that its sender chose, the same wherever the
        word stands.
      dtype: float32 for values; for positions int32 or int64.
      below: positions are ascending, each once, from 0 to below this; 0 for values.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32
    below: int = 0


RequiredTensors = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class AuxiliarySpec:
    """What a method that takes given tensors says of them.

    Attributes:
      wants: which ones, of a model before or after the adapter is attached; none where the spec's options need none.
      attach: as the method's own, with the tensors that were checked.
      hint: the way to them, for messages.
      frozen: how many earlier bottleneck adapters they are, by the spec.
    """

    wants: Callable[[nn.Module, AdapterSpec], RequiredTensors]
    attach: Callable[[nn.Module, AdapterSpec, AuxiliaryTensors], nn.Module]
    hint: str
    frozen: Callable[[AdapterSpec], int] = field(default=lambda spec: 0)


def positions(count: int, entries: int) -> TensorSpec:
    """Returns what stands for `count` positions in a flattened matrix of so many entries."""
    narrow = entries <= torch.iinfo(torch.int32).max
    return TensorSpec((count,), torch.int32 if narrow else torch.int64, below=entries)


def check_auxiliary(wanted: RequiredTensors, given: AuxiliaryTensors, *, hint: str) -> None:
    """Refuses tensors that are not exactly the wanted ones: whoever sent them is not trusted.

    Raises:
      MalformedMessage: one is missing or of no use, has another shape or dtype, is not finite, or is no ascending list
        of positions.
    """
    if different := sorted(wanted.keys() ^ given.keys()):
        rule = "is missing" if different[0] in wanted else "has no use here"
        raise MalformedMessage(f"given={different[0]!r} {rule}: {hint}")
    lengths: dict[str, int] = {}
    for name, want in wanted.items():
        tensor = given[name]
        if tensor.dtype != want.dtype or not _fits(tuple(tensor.shape), want, lengths):
            shape = tuple(lengths.get(length, length) if isinstance(length, str) else length for length in want.shape)
            raise MalformedMessage(
                f"given={name!r} is {tensor.dtype} {tuple(tensor.shape)}, must be {want.dtype} {shape}: {hint}"
            )
        if want.below and not _ascending(tensor, want.below):
            raise MalformedMessage(f"given={name!r} must be ascending positions in 0..{want.below - 1}: {hint}")
        if not want.below and not torch.isfinite(tensor).all():
            raise MalformedMessage(f"given={name!r} holds NaN or Inf, must be finite: {hint}")


def dummy_tensors_for(wanted: RequiredTensors, *, free: int, seed: int) -> dict[str, Tensor]:
    """Returns tensors that nobody made, to try a method on; they depend on the seed and the shapes alone.

    Args:
      wanted: of the method.
      free: value of every length that a sender may choose, >= 1.
      seed: public.
    """
    generator = seeded(seed)
    return {name: _drawn(wanted[name], free, generator) for name in sorted(wanted)}


def _drawn(want: TensorSpec, free: int, generator: torch.Generator) -> Tensor:
    shape = [free if isinstance(length, str) else length for length in want.shape]
    if want.below:
        found = torch.randperm(want.below, generator=generator)[: math.prod(shape)]
        return found.sort().values.to(want.dtype)
    return INVENTED_SCALE * torch.randn(shape, generator=generator)


def _fits(shape: tuple[int, ...], want: TensorSpec, lengths: dict[str, int]) -> bool:
    if len(shape) != len(want.shape):
        return False
    for found, length in zip(shape, want.shape, strict=True):
        chosen = isinstance(length, str) and 1 <= found <= MAX_LENGTH
        if found != (lengths.setdefault(str(length), found) if chosen else length):
            return False
    return True


def _ascending(tensor: Tensor, below: int) -> bool:
    steps = tensor[1:] > tensor[:-1]  # no difference is taken, which could wrap
    return bool(steps.all()) and int(tensor[0]) >= 0 and int(tensor[-1]) < below
