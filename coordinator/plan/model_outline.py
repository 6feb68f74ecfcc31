"""The outline of a full model: its structure on the meta device, from its configuration alone."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from offsite.adapter.targets import hidden_size
from offsite.coordinator.plan.meta_run import META
from offsite.emulator.structure.from_config import empty_model, kind_of, own_config_text
from offsite.emulator.structure.towers import main_tower
from offsite.errors import ConfigError, lookup
from offsite.task.checkpoint import stored_dtype
from offsite.task.tasks import TASKS

FLOAT32 = 4


@dataclass(frozen=True)
class Outline:
    """A full model without weights.

    Attributes:
      model: full model on the meta device, float32; frozen, without an adapter.
      task: task that the model is trained for.
      tower: module path of the list of blocks.
      blocks: module paths of the blocks, in order.
      stored: dtype of the checkpoint's weights.
      name: name of the model's folder.
    """

    model: Any
    task: Any
    tower: str
    blocks: tuple[str, ...]
    stored: torch.dtype
    name: str

    @property
    def parameters(self) -> int:
        """Number of parameters; tied parameters count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def outside(self) -> int:
        """Number of parameters outside the blocks, most of them in the embedding tables."""
        return self.parameters - sum(self.block_parameters())

    def block_parameters(self) -> list[int]:
        """Returns the number of parameters of each block."""
        return [sum(p.numel() for p in self.model.get_submodule(path).parameters()) for path in self.blocks]

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return hidden_size(self.model.get_submodule(self.blocks[-1]))

    def cut(self, first: int, last: int, middle: int) -> Any:
        """Returns a copy of the model with fewer blocks: the ends, and so many blocks of the middle."""
        names = self.blocks[:first] + self.blocks[first : first + middle] + self.blocks[len(self.blocks) - last :]
        everything = self.model.get_submodule(self.tower)
        kept = [self.model.get_submodule(path) for path in names]
        self.model.set_submodule(self.tower, type(everything)())
        try:
            smaller = copy.deepcopy(self.model)
        finally:
            self.model.set_submodule(self.tower, everything)
        smaller.set_submodule(self.tower, type(everything)(copy.deepcopy(kept)))
        return smaller


def read_outline(folder: Path, task: str = "causal_lm") -> Outline:
    """Returns the outline of a model folder; only its config.json is read.

    Raises:
      DataError: the folder has no readable configuration.
      UnsupportedModel: the model is of an unknown type, quantised, or has no tower of alike blocks.
      ConfigError: the model's class is none of the task's.
      MalformedMessage: the configuration asks for more than any honest model.
    """
    known = lookup(TASKS, task, "task")
    text = own_config_text(folder)
    kind = kind_of(text)
    if kind != known.kind:
        raise ConfigError(f"task={task!r} takes a model of kind {known.kind}; {folder.name!r} is of kind {kind}")
    with _quiet(), torch.device(META):
        model: Any = empty_model(text, kind, torch.float32)
    return outline_of(model, known, stored_dtype(folder), folder.name)


def outline_of(model: Any, task: Any, stored: torch.dtype, name: str) -> Outline:
    """Returns the outline of a model that lies on the meta device; raises as `read_outline`."""
    tower = main_tower(model)
    if tower.apart:
        raise ConfigError(f"model={name!r}: a U-net's blocks differ in width, and no plan is made for such a model yet")
    return Outline(model.requires_grad_(False).eval(), task, tower.path, tower.blocks, stored, name)


def leaves(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields name and shape of each parameter."""
    for name, parameter in model.named_parameters():
        yield name, tuple(parameter.shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' warnings about a configuration to itself: no weight is loaded here."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
