"""Runs public examples through the full model block by block, so that memory holds a few blocks and not the model.

First the model is called once with blocks that hand their input on: this call shows the tower's inputs and each block's
other arguments. From then on a block is one function from hidden states to hidden states.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache

from offsite.emulator.calibration.source import Source
from offsite.emulator.structure.identity_block import Form, bind, in_form, output_form
from offsite.errors import ConfigError, UnsupportedModel
from offsite.task.number_format import dtype_of

Hidden = list[Tensor]
Run = Callable[[nn.Module], object]


@dataclass(frozen=True)
class ForwardCall:
    """The arguments of one call of a block, but for its hidden states.

    Attributes:
      args: positional arguments; a None stands in the place of the hidden states.
      kwargs: keyword arguments; without positional ones, the first is None in the place of the hidden states.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on(self, block: nn.Module, hidden: Tensor) -> Any:
        """Returns the block's output for hidden states, in the block's own form and number format."""
        dtype = dtype_of(block)
        args, kwargs, hidden = _in_dtype(self.args[1:], dtype), _in_dtype(self.kwargs, dtype), hidden.to(dtype)
        return block(hidden, *args, **kwargs) if self.args else block(**{**kwargs, next(iter(kwargs)): hidden})


@dataclass(frozen=True)
class Stream:
    """The public examples at a tower's entry, and the arguments of each block's calls.

    Attributes:
      inputs: hidden states that enter the first block, float32 (examples, positions, width) for each call of the model.
      calls: arguments of the block's calls by block path, one for each call of the model.
      forms: form in which each block hands its result on, by block path.
      apart: inputs of each block in the called model, by path, if other modules stand between the blocks; else empty,
        since the output of a block is the input of the next.
    """

    inputs: Hidden
    calls: dict[str, list[ForwardCall]]
    forms: dict[str, Form]
    apart: dict[str, Hidden] = field(default_factory=dict)

    def entering(self, path: str, before: Hidden) -> Hidden:
        """Returns the inputs of a block: the outputs `before` of the previous block, unless blocks stand apart."""
        return self.apart.get(path, before)

    def run(self, block: nn.Module, path: str, hidden: Hidden) -> Hidden:
        """Returns a block's outputs for hidden states when it stands at `path`; float32, without gradients."""
        with torch.no_grad():
            return list(self.each(block, path, hidden))

    def each(self, block: nn.Module, path: str, hidden: Hidden) -> Iterator[Tensor]:
        """Yields the outputs of `run` one call at a time, with gradients if they are enabled."""
        for call, states in zip(self.calls[path], hidden, strict=True):
            yield bare(call.on(block, states)).float()


def bare(output: Any) -> Tensor:
    """Returns the hidden states of a block's output."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def begin(
    source: Source, blocks: tuple[str, ...], alone: tuple[str, ...], run: Run | None, *, apart: bool = False
) -> Stream:
    """Returns the stream of public examples at a tower's entry.

    Args:
      source: the full model.
      blocks: paths of the tower's blocks, in order.
      alone: paths of the blocks that own a tensor which the other blocks use; these blocks run at each call.
      run: function that calls a model with public examples only; None if there are no examples.
      apart: True if other modules stand between the blocks; then all blocks run.

    Raises:
      ConfigError: there are no examples.
      UnsupportedModel: a block was not called, or hands its result on in an unknown form.
    """
    if run is None:
        raise ConfigError("calibration=None: this compressor needs public examples to run; give public records")
    recorders = {path: _Recorder(source, path, always=apart or path in alone) for path in blocks}
    for path, recorder in recorders.items():
        source.model.get_submodule(path).forward = recorder
    try:
        with torch.no_grad():
            run(source.model)
    finally:
        for recorder in recorders.values():
            recorder.leave()
    if missing := [path for path, recorder in recorders.items() if not recorder.calls]:
        raise UnsupportedModel(f"block={missing[0]}: the public examples never call it; use another tower")
    first = recorders[blocks[0]]
    return Stream(
        first.inputs,
        {path: recorder.calls for path, recorder in recorders.items()},
        {path: recorder.form for path, recorder in recorders.items()},
        {path: recorder.inputs for path, recorder in recorders.items()} if apart else {},
    )


def private(block: nn.Module) -> nn.Module:
    """Returns a float32 copy of a block, which may be changed."""
    return copy.deepcopy(block).float().requires_grad_(False)


def influence(before: Hidden, after: Hidden) -> float:
    """Returns the mean over positions of 1 - cosine(input, output), in 0..2: Block Influence.

    Men et al. 2024 (ShortGPT), equation 1.
    """
    pairs = zip(before, after, strict=True)
    distances = [1 - functional.cosine_similarity(a.double(), b.double(), dim=-1).flatten() for a, b in pairs]
    return float(torch.cat(distances).mean())


class _Recorder:
    """Replaces a block's forward: records the call, and returns the input in the block's own form."""

    def __init__(self, source: Source, path: str, *, always: bool) -> None:
        self._source, self._path, self._always = source, path, always
        self._block = source.model.get_submodule(path)
        self._signature = inspect.signature(type(self._block).forward)
        self._own = vars(self._block).get("forward")  # of a block that makes its weights ready when it is called
        self._plain: Callable[..., Any] = self._block.forward
        self.calls: list[ForwardCall] = []
        self.inputs: Hidden = []
        self.form: Form = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Keys and values cached in an earlier call would be read, and extended, by each later call.
        args, kwargs = tuple(map(_without_cache, args)), {key: _without_cache(value) for key, value in kwargs.items()}
        arguments = bind(self._signature, self._block, args, kwargs)
        hidden = next(iter(arguments.values()))
        self.inputs.append(hidden.detach().float())
        if args:
            self.calls.append(ForwardCall((None, *args[1:]), kwargs))
        else:
            first = next(iter(arguments))
            self.calls.append(ForwardCall((), {first: None, **{k: v for k, v in kwargs.items() if k != first}}))
        if self._always or not self.form:
            output = self._real(args, kwargs)
            self.form = output_form(self._block, arguments, output)
            if self._always:
                return output
        return in_form(self.form, arguments, None)

    def leave(self) -> None:
        """Gives the block its own forward pass back."""
        vars(self._block).pop("forward")
        if self._own is not None:
            self._block.forward = self._own

    def _real(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._source.open(self._path):
            return self._plain(*args, **kwargs)


def _without_cache(value: Any) -> Any:
    return None if isinstance(value, Cache) else value


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Returns a value with its floating tensors in a number format, also inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_in_dtype(member, dtype) for member in value)
    if type(value) is dict:
        return {key: _in_dtype(member, dtype) for key, member in value.items()}
    return value
