"""Sources of the full model's weights for a build: a model in memory, or the safetensors shards of its folder.

With shards, only the blocks that are needed at the moment are in memory, so a model may be larger than the machine.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from offsite.emulator.structure.from_config import empty_model, kind_of, own_config_text
from offsite.emulator.structure.towers import main_tower
from offsite.errors import UnsupportedModel
from offsite.task.device import CPU
from offsite.task.model_folder import check_weights, unused, weight_files
from offsite.task.packed_weights import dense_tensors, without_zero_biases

log = logging.getLogger("offsite.emulator")
# Tables of positions that earlier releases of transformers stored; transformers passes over them, too.
HARMLESS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


class Source(Protocol):
    """A full model; some blocks may be on disk.

    Attributes:
      model: the full model; a block of the tower that is on disk has weights within `open` only.
    """

    model: nn.Module

    def open(self, path: str) -> AbstractContextManager[nn.Module]:
        """Yields a block of the tower with its weights in memory."""

    def keep(self, paths: tuple[str, ...]) -> None:
        """Holds blocks in memory from now on, because adapters will be attached to them."""

    def passing(self) -> AbstractContextManager[None]:
        """Lets the whole model be called within the context, with and without gradients; blocks come and go."""


class MemorySource:
    """A model that is whole in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def open(self, path: str) -> AbstractContextManager[nn.Module]:
        """Yields the block."""
        return nullcontext(self.model.get_submodule(path))

    def keep(self, paths: tuple[str, ...]) -> None:
        """Does nothing: all blocks are in memory."""

    def passing(self) -> AbstractContextManager[None]:
        """Does nothing: the model can be called at any time."""
        return nullcontext()


class ShardSource:
    """A model folder with safetensors files, read block by block.

    Args:
      folder: the model's folder, with config.json.
      dtype: floating dtype of the weights in memory.
      device: device to which weights are read.

    Raises:
      DataError: a file is missing or cannot be read.
      UnsupportedModel: the checkpoint's names are not the model's.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device | str = CPU) -> None:
        text = own_config_text(folder)
        check_weights(folder)
        self._packed = dense_tensors(folder)
        self._files = {n: tensor.file for n, tensor in self._packed.items()} or weight_files(folder)
        self.model: Any = empty_model(text, kind_of(text), dtype)
        self._blocks = main_tower(self.model).blocks
        self._dtype, self._device = dtype, torch.device(device)
        names = self.model.state_dict(keep_vars=True)
        self._stored = _stored_names(self.model, names, self._files)
        if note := unused(folder, self._without_place(), self.model.config):
            log.warning("%s", note)
        inside = tuple(f"{path}." for path in self._blocks)
        for path in self._blocks:
            self.model.get_submodule(path).to("meta")
        self._fill({name: tensor for name, tensor in names.items() if not name.startswith(inside)})
        _move(self.model, self._device)
        self._originals: dict[str, nn.Module] = {path: self.model.get_submodule(path) for path in self._blocks}
        self._kept: set[str] = set()

    @contextmanager
    def open(self, path: str) -> Iterator[nn.Module]:
        """Yields a block; its weights are read from disk before, and dropped afterwards."""
        block = self.model.get_submodule(path)
        if path in self._kept:
            yield block
            return
        self._load(path, block)
        try:
            yield block
        finally:
            # New objects: only a graph that still needs the old weights keeps them.
            for owner, leaf, tensor in _own_tensors(block):
                owner[leaf] = _like(tensor, tensor.to("meta"))

    def keep(self, paths: tuple[str, ...]) -> None:
        """Reads blocks once, and keeps them in memory."""
        for path in paths:
            if path in self._blocks and path not in self._kept:
                self._load(path, self.model.get_submodule(path))
                self._kept.add(path)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Lets each block read its weights when it is called, and again when its gradient is computed."""
        # A module that stands in for a block has weights of its own.
        loose = {
            path: block
            for path, block in self._originals.items()
            if path not in self._kept and self.model.get_submodule(path) is block
        }
        for path, block in loose.items():
            block.forward = self._visit(path, block)
        try:
            yield
        finally:
            for block in loose.values():
                vars(block).pop("forward", None)

    def _without_place(self) -> list[str]:
        """Returns the stored names for which the model has no place; transformers knows some of them as harmless."""
        harmless = [*HARMLESS, *(self.model._keys_to_ignore_on_load_unexpected or ())]
        left = self._files.keys() - set(self._stored.values())
        named = sorted(name for name in left if not any(re.search(pattern, name) for pattern in harmless))
        return without_zero_biases(self._packed, named)

    def _visit(self, path: str, block: nn.Module) -> Callable[..., Any]:
        kind: Any = type(block)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.open(path):
                return kind.forward(block, *args, **kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return checkpoint(call, *args, use_reentrant=False, **kwargs)
            return call(*args, **kwargs)

        return forward

    def _load(self, path: str, block: nn.Module) -> None:
        names = {f"{path}.{name}" for name in block.state_dict()}
        with torch.no_grad():
            read = self._read(names, self._device)
            for name in names:
                owner, leaf = _owner(self.model, name)
                owner[leaf] = _like(owner[leaf], read[name])

    def _fill(self, targets: dict[str, Tensor]) -> None:
        read = self._read(set(targets), torch.device(CPU))
        with torch.no_grad():
            for name, tensor in read.items():
                targets[name].copy_(tensor)

    def _read(self, names: set[str], device: torch.device) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = {}
        for name in sorted(names & self._stored.keys()):
            by_file.setdefault(self._files[self._stored[name]], []).append(name)
        read: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            with safe_open(file, framework="pt") as stored:
                for name in wanted:
                    own = self._stored[name]
                    tensor = self._packed[own].read() if own in self._packed else stored.get_tensor(own)
                    # A copy: the file's pages are gone once it is closed.
                    kept = tensor.to(self._dtype) if tensor.is_floating_point() else tensor
                    read[name] = kept.to(device, copy=True)
        return read


def _stored_names(model: Any, names: dict[str, Tensor], files: dict[str, Path]) -> dict[str, str]:
    """Returns the checkpoint's name of each of the model's tensors, by transformers' own table of renamings."""
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    prefix = str(getattr(model, "base_model_prefix", ""))
    renamed = {rename_source_key(name, renamings, [], prefix, names)[0]: name for name in files}
    stored_names = {name: stored for name, stored in renamed.items() if name in names}
    present = {id(names[name]) for name in stored_names}
    missing = [name for name, tensor in names.items() if id(tensor) not in present]
    if missing:
        raise UnsupportedModel(
            f"tensor={missing[0]} is not in the checkpoint under this name ({len(missing)} missing), so the model "
            "cannot be read block by block; build with the whole model in memory"
        )
    return stored_names


def _owner(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if leaf in module._parameters else module._buffers), leaf


def _own_tensors(block: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for name, tensor in block.state_dict(keep_vars=True).items():
        owner, leaf = _owner(block, name)
        yield owner, leaf, tensor


def _move(model: nn.Module, device: torch.device) -> None:
    """Moves all weights that are in memory to a device; a weight that two modules share is still one weight."""
    if device.type == CPU:
        return
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # with the old tensor, whose id then belongs to no other
    for owner in (tensors for module in model.modules() for tensors in (module._parameters, module._buffers)):
        for leaf, tensor in owner.items():
            if tensor is not None and not tensor.is_meta:
                moved.setdefault(id(tensor), (tensor, _like(tensor, tensor.to(device))))
                owner[leaf] = moved[id(tensor)][1]


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
