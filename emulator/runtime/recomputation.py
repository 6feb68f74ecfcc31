"""Activations that are computed again in the backward pass instead of kept (Chen et al. 2016, arXiv 1604.06174).

Only whole blocks without a trained parameter are computed again. Their activations make up most of a step's memory, and
no engine listens inside of them: taps and hooks sit on trained modules, and so fire once, as without recomputation.
"""

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint


def frozen_blocks(model: nn.Module, blocks: tuple[str, ...]) -> list[nn.Module]:
    """Returns the blocks of a model, by path, that have no trained parameter."""
    found = [model.get_submodule(path) for path in blocks]
    return [block for block in found if not any(parameter.requires_grad for parameter in block.parameters())]


def kept_bytes(blocks: list[nn.Module], run: Callable[[], object]) -> int:
    """Returns the bytes that autograd keeps of some blocks in one forward pass beside their weights, each storage once.

    Args:
      blocks: the blocks.
      run: function that calls the model once, with gradients.
    """
    sizes: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for block in blocks for parameter in block.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    inside = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    handles = []
    for block in blocks:
        handles.append(block.register_forward_pre_hook(lambda *_: inside.__enter__() and None))
        handles.append(block.register_forward_hook(lambda *_: inside.__exit__(), always_call=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return sum(sizes.values())


def recompute_blocks(blocks: list[nn.Module]) -> None:
    """Makes frozen blocks keep their inputs only, in place; gradients stay the same to the last bit."""
    for block in blocks:
        _wrap(block)


def _wrap(block: nn.Module) -> None:
    plain = block.forward

    def once(*args: Any, **kwargs: Any) -> Any:
        _give_back()
        return plain(*args, **kwargs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
            return plain(*args, **kwargs)  # nothing would be kept
        return checkpoint(once, *args, use_reentrant=False, **kwargs)  # with the states of all random generators

    block.forward = forward


def _give_back() -> None:
    """Gives memory that is free between memory in use back to the system; only glibc holds so much of it."""
    if _TRIM is not None:
        _TRIM(0)


_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
