"""Lets a model's blocks rest in the format of their files; each is made ready for the time of its call, and no longer.

A block at rest lies in the mapped file, on the CPU, or in the memory of an accelerator. Its call widens it to the
format of the computation on the device of the computation. So memory peaks at one block in that format, beside the
resting weights. A backward pass computes a block anew (Chen et al. 2016, arXiv 1604.06174), so that it finds the
block's weights ready, too. accelerate's offloading hooks only serve calls without gradients.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offsite.adapter.auxiliary import NO_AUXILIARY, AuxiliaryTensors
from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.structure.denoisers import is_diffusion
from offsite.emulator.structure.towers import find_towers
from offsite.task.mapped_weights import MappedWeights, mapped_weights


@dataclass
class ComputeFormat:
    """Where and how the blocks of one model compute; all of them share this object.

    Attributes:
      device: device of the computation.
      wide: whether weights of 16 bits are widened to float32; else each keeps its dtype.
    """

    device: torch.device
    wide: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "ComputeFormat":
        """Returns itself: a copy of a block computes as the block does."""
        return self

    def fits(self, tensor: Tensor) -> bool:
        """Returns whether a tensor is on the device, and wide if it has to be."""
        return tensor.device == self.device and self.kind(tensor) == tensor.dtype

    def ready(self, tensor: Tensor) -> Tensor:
        """Returns a tensor on the device, wide if it has to be, and differentiable if it is trained."""
        made = tensor.to(self.device, self.kind(tensor))
        trained = tensor.requires_grad and torch.is_grad_enabled()
        return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) and not trained else made

    def kind(self, tensor: Tensor) -> torch.dtype:
        """Returns the dtype in which a tensor computes."""
        narrow = tensor.is_floating_point() and tensor.itemsize < torch.float32.itemsize
        return torch.float32 if self.wide and narrow else tensor.dtype


@dataclass
class BlockCall:
    """The forward pass of a block whose weights are ready only while it runs; stands in the place of the block's own.

    Attributes:
      block: the block; in a deep copy of the block, the copy.
      format: format of the computation.
      mapped: weights of the block in mapped files, whose pages are given back after the call.
    """

    block: nn.Module
    format: ComputeFormat
    mapped: MappedWeights = field(default_factory=MappedWeights)

    def __post_init__(self) -> None:
        """Takes over the signature of the block's own forward pass, by which callers bind arguments."""
        self.__signature__ = inspect.signature(self._own())

    def __deepcopy__(self, memo: dict[int, Any]) -> "BlockCall":
        """Returns the call of the block's copy, whose weights lie in no file."""
        return BlockCall(copy.deepcopy(self.block, memo), self.format)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the block's output; where gradients are taken of it, it is computed again in the backward pass."""
        if not torch.is_grad_enabled():
            return self._run(*args, **kwargs)
        if next(_unready(self.block, self.format), None) is not None:
            return checkpoint(self._run, *args, use_reentrant=False, **kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(self._passed)  # called when the backward pass is through the block
                break
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with opened(self):
            return self._own()(*args, **kwargs)

    def _own(self) -> Callable[..., Any]:
        own: Any = type(self.block).forward.__get__(self.block)
        return own

    def _passed(self, gradient: Tensor) -> None:
        self.mapped.give_back()


@contextmanager
def opened(call: BlockCall) -> Iterator[None]:
    """Makes a block ready within the context, and puts the resting weights back where nothing else took their place."""
    resting: list[tuple[dict[str, Any], str, Tensor]] = []
    made: dict[int, Tensor] = {}  # two places may share a weight
    try:
        for owner, leaf, tensor in list(_unready(call.block, call.format)):
            if id(tensor) not in made:
                made[id(tensor)] = call.format.ready(tensor)
            resting.append((owner, leaf, tensor))
            owner[leaf] = made[id(tensor)]
        yield
    finally:
        for owner, leaf, tensor in resting:
            ready = made[id(tensor)]
            # An adapter that was attached within the context may have made the weight its own.
            unchanged = tensor.requires_grad or not ready.requires_grad
            if unchanged and owner.get(leaf) is ready:
                owner[leaf] = tensor
        call.mapped.give_back()


class OffloadedModel:
    """A model in memory or in mapped files that computes block by block; a `calibration.source.Source` of builds.

    Models of diffusers, which use parts of their blocks from outside, and weights outside all towers are made ready
    once and stay so.

    Args:
      model: the frozen model as it was loaded; its blocks get another `forward`.
      device: device of the computation; blocks stay where they are.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self._format = ComputeFormat(device)
        towers = [] if is_diffusion(model) else find_towers(model)
        for path in [path for tower in towers for path in tower.blocks]:
            block = model.get_submodule(path)
            call = BlockCall(block, self._format, mapped_weights((*block.parameters(), *block.buffers())))
            block.forward = call
        self._settle()

    def compute_in(self, dtype: torch.dtype) -> None:
        """Sets the floating dtype of the computation from now on, before an adapter is attached.

        Weights in another dtype get it at once, in memory, but for weights of 16 bits that compute in float32: each
        block of these rests as before. Tables that the model computes for itself stay as they are, unless in float32.
        """
        self._format.wide = dtype == torch.float32
        for tensor in self.model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point() and self._format.kind(tensor) != dtype:
                tensor.data = tensor.data.to(dtype)
        self._settle()

    def attach(self, spec: AdapterSpec, auxiliary: AuxiliaryTensors = NO_AUXILIARY) -> nn.Module:
        """Attaches an adapter for good and returns the model to use, as `attach_to_resting`."""
        wrapped = attach_to_resting(self.model, spec, auxiliary)
        self._settle()
        return wrapped

    @contextmanager
    def open(self, path: str) -> Iterator[nn.Module]:
        """Yields a block, ready."""
        block = self.model.get_submodule(path)
        call = call_of(block)
        if call is None:
            yield block
            return
        with opened(call):
            yield block

    def keep(self, paths: tuple[str, ...]) -> None:
        """Does nothing: the resting weights of a block can be differentiated with respect to."""

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Does nothing: the model can be called at any time."""
        yield

    @property
    def device(self) -> torch.device:
        """Device of the computation."""
        return self._format.device

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the blocks' weights that lie in mapped files."""
        calls = (call_of(module) for module in self.model.modules())
        return sum(call.mapped.size for call in calls if call is not None)

    def _settle(self) -> None:
        """Makes ready for good what lies in no block, and what is trained."""
        inside = {id(table) for block in self.model.modules() if call_of(block) for table in _tables(block)}
        made: dict[int, Tensor] = {}
        for owner, leaf, tensor in list(_unready(self.model, self._format)):
            if id(owner) not in inside or tensor.requires_grad:
                if id(tensor) not in made:
                    ready = self._format.ready(tensor.detach())
                    kind = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(ready, requires_grad=tensor.requires_grad) if kind else ready
                owner[leaf] = made[id(tensor)]


def call_of(block: nn.Module) -> BlockCall | None:
    """Returns the call that stands in the place of a block's forward pass, or None."""
    call = vars(block).get("forward")
    return call if isinstance(call, BlockCall) else None


def attach_to_resting(model: nn.Module, spec: AdapterSpec, auxiliary: AuxiliaryTensors = NO_AUXILIARY) -> nn.Module:
    """Attaches an adapter, as `adapter.methods.attach`, while the slots' blocks are ready.

    Some adapters are made of the weights of their slots, in the format in which these compute. The frozen weights rest
    again afterwards.
    """
    modules = dict(model.named_modules())
    calls = [call for path in spec.slots if path in modules and (call := call_of(modules[path]))]
    with ExitStack() as stack:
        for call in calls:
            stack.enter_context(opened(call))
        return attach(model, spec, auxiliary)


def _tables(module: nn.Module) -> Iterator[dict[str, Any]]:
    for child in module.modules():
        yield child._parameters
        yield child._buffers


def _unready(module: nn.Module, how: ComputeFormat) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yields the tensors of a module that are not ready, with the table that holds them and their name there."""
    for table in _tables(module):
        for leaf, tensor in table.items():
            if tensor is not None and not how.fits(tensor):
                yield table, leaf, tensor
