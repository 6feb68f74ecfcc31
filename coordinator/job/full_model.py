"""The full model at the coordinator, in the format of its files; where its blocks rest follows from the memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offsite.coordinator.config.federation_file import FedConfig
from offsite.emulator.runtime.offload import OffloadedModel
from offsite.emulator.structure.towers import find_towers
from offsite.task.checkpoint import check_memory, stored_dtype
from offsite.task.device import CPU, choose_device
from offsite.task.device_memory import free_memory
from offsite.task.number_format import choose_dtype, name_of
from offsite.task.offload_setting import ALWAYS, AUTO, NEVER
from offsite.task.spec import Task

WIDEST = 4  # bytes of a number in the widest format of the computation
SPARE = 1.2  # for activations and the allocator


def open_full_model(task: Task, config: FedConfig, on_step: Callable[[str], None]) -> OffloadedModel:
    """Returns the full model of a job, frozen, in the dtype of its files.

    Args:
      task: task of the job.
      config: the federation file.
      on_step: function that takes a text about what is being done.

    Raises:
      ConfigError: there is no such device, or its memory is too small.
      DataError, UnsupportedModel: as for `task.checkpoint.load`.
    """
    device = choose_device(config.compute.device)
    check_full_model_fits(config, device)
    on_step(f"load the full model, device={device}")
    model = task.load(config.model.path, dtype=stored_dtype(Path(config.model.path)))
    setting = config.compute.offload
    if device.type != CPU and setting != ALWAYS:
        needed, free = needed_bytes(model), free_memory(device)
        if setting == AUTO and needed > free:
            on_step(f"offload=auto: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free: blocks come one at a time")
        else:
            model = model.to(device)
    full = OffloadedModel(model, device)
    mapped, size = full.mapped_bytes, _bytes(model)
    if mapped:
        on_step(f"full model: {mapped / 1e9:.2f} of {size / 1e9:.2f} GB are read from the files, block by block")
    return full


def compute_as_set(config: FedConfig, full: OffloadedModel, on_step: Callable[[str], None]) -> None:
    """Lets a full model compute from now on in the number format that the federation file names.

    Raises:
      ConfigError: the device does not compute in this format.
    """
    dtype = choose_dtype(config.compute.dtype, full.device, _numbers(full.model))
    on_step(f"compute in dtype={name_of(dtype)}")
    full.compute_in(dtype)


def check_full_model_fits(config: FedConfig, device: torch.device) -> None:
    """Refuses a full model that is larger than the memory in which it has to lie as a whole, before it is loaded.

    Raises:
      ConfigError: the weights alone are larger; the message says what they need and what would make them fit.
    """
    if device.type == CPU or config.compute.offload == NEVER:
        check_memory(Path(config.model.path), device, mapped=device.type == CPU)


def needed_bytes(model: nn.Module) -> int:
    """Returns the memory in bytes that a model needs whose blocks rest on the device of the computation.

    This is the model in its own dtype, and in the widest dtype one block and all that lies in no block.
    """
    blocks = [_numbers(model.get_submodule(path)) for tower in find_towers(model) for path in tower.blocks]
    wide = _numbers(model) - sum(blocks) + max(blocks, default=0)
    return int(SPARE * (_bytes(model) + WIDEST * wide))


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
