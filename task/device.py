"""The device on which a model computes: named by its owner, or the accelerator that is there."""

import re
from typing import TYPE_CHECKING

from offsite.errors import ConfigError
from offsite.task.determinism import compute_deterministically

if TYPE_CHECKING:  # the name of a device is checked by commands that need no model
    import torch
    from torch import nn

AUTO, CPU = "auto", "cpu"
MAX_PROCESSES = 64
WITHOUT_FLOAT64 = ("mps",)  # no place for clipped sums, which are added in float64
_NAME = re.compile(r"[a-z]+(:[0-9]{1,3})?")  # also of devices for which PyTorch has an extension


def device_of(model: "nn.Module") -> "torch.device":
    """Returns the device of a model's first parameter, which is where its inputs go; the CPU without a parameter."""
    import torch

    return next((parameter.device for parameter in model.parameters()), torch.device(CPU))


def check_device(name: str, key: str = "device") -> None:
    """Checks the form of a device's name, wherever the device is.

    Raises:
      ConfigError: no device has such a name.
    """
    if not _NAME.fullmatch(name) or name.startswith(f"{CPU}:"):
        raise ConfigError(f"{key}={name!r}: must be auto, cpu, cuda, cuda:N or xpu, with N from 0", key=key)


def choose_device(name: str) -> "torch.device":
    """Returns the device of a name, on which this process computes deterministically from now on.

    Args:
      name: `auto` for the accelerator that PyTorch finds, or the CPU where there is none that has float64; else the
        name of a device, for example `cuda:1`.

    Raises:
      ConfigError: the name is none of a device, PyTorch finds no such device on this machine, or the device has no
        float64.
    """
    device = _chosen(name)
    compute_deterministically(device)
    return device


def _chosen(name: str) -> "torch.device":
    import torch

    check_device(name)
    found = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if found is not None else 0
    if name == AUTO and found is not None and found.type in WITHOUT_FLOAT64:
        return torch.device(CPU)
    if name == AUTO:
        here = torch.accelerator.current_device_index() if found is not None else None
        return torch.device(CPU) if found is None else torch.device(found.type, here)
    kind, _, number = name.partition(":")
    if kind == CPU:
        return torch.device(CPU)
    if found is None or found.type != kind or int(number or 0) >= count:
        there = "" if found is None else f", {found.type}:0 to {found.type}:{count - 1}"
        raise ConfigError(
            f"device={name!r}: PyTorch {torch.__version__} finds no such device here, but {CPU}{there}; name a device "
            "that is here, or install the build of PyTorch for yours"
        )
    if kind in WITHOUT_FLOAT64:
        raise ConfigError(f"device={name!r} has no float64, in which clipped sums are added; set device = {CPU!r}")
    return torch.device(kind, int(number or 0))


def check_processes(device: str, processes: int) -> None:
    """Checks a number of processes that train side by side, whatever this machine has.

    Raises:
      ConfigError: the number is out of range, or the device's name is that of one of several devices.
    """
    if not 1 <= processes <= MAX_PROCESSES:
        raise ConfigError(f"processes={processes}: must be from 1 to {MAX_PROCESSES}; 1 trains in one process")
    if processes > 1 and ":" in device:
        kind = device.partition(":")[0]
        raise ConfigError(
            f"processes={processes} device={device!r}: each process takes a device of its own, and this names one; set "
            f"device = {kind!r}, and choose among several by the driver's own variable, as CUDA_VISIBLE_DEVICES=1,2"
        )


def choose_devices(name: str, processes: int) -> tuple["torch.device", ...]:
    """Returns the device of each process that trains side by side: the CPU for all, or one accelerator for each.

    Args:
      name: name of the device, as for `choose_device`.
      processes: number of processes, see `check_processes`.

    Raises:
      ConfigError: as `choose_device` and `check_processes`, or the machine has fewer accelerators than processes.
    """
    import torch

    check_processes(name, processes)
    first = choose_device(name)
    if processes == 1 or first.type == CPU:
        return (first,) * processes
    if processes > (count := torch.accelerator.device_count()):
        raise ConfigError(
            f"processes={processes} device={name!r}: PyTorch finds {count} of {first.type} here, and each process "
            f"takes one of its own; set processes = {count}, or device = {CPU!r}"
        )
    return tuple(torch.device(first.type, index) for index in range(processes))


def too_many(devices: tuple["torch.device", ...]) -> str:
    """Returns a warning where more processes share the CPU than it has threads for; else an empty text."""
    import torch

    threads = torch.get_num_threads()
    if devices[0].type != CPU or len(devices) <= threads:
        return ""
    return (
        f"processes={len(devices)}: PyTorch has {threads} processor threads here, so processes wait for each other; "
        f"set processes to at most {threads} in site.toml"
    )
