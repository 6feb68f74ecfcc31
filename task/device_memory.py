"""Memory of a device: what is free there, and the most that some work has held at once."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from offsite.errors import ConfigError
from offsite.task.device import CPU

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
CONTAINER = Path("/sys/fs/cgroup")
GIGABYTE = 2**30


@dataclass
class Peak:
    """The most memory that was held at once, bytes: of the device's allocator, or of this process on the CPU."""

    bytes: int = 0


@contextmanager
def peak_of(device: torch.device) -> Iterator[Peak]:
    """Measures the body of a `with` statement, also where it raises; see `reset_peak`."""
    peak = Peak()
    reset_peak(device)
    try:
        yield peak
    finally:
        peak.bytes = held_at_most(device)


def reset_peak(device: torch.device) -> None:
    """Sets the high-water mark of a device back to the memory that is held now; on the CPU only Linux can do so."""
    if has_allocator(device):
        torch.accelerator.synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # a process without core dumps may not, and its mark is then that of its whole life
        CLEAR_REFS.write_text("5", encoding="ascii")


def held_at_most(device: torch.device) -> int:
    """Returns the high-water mark since the last reset, bytes, or what this process holds where no mark exists."""
    if has_allocator(device):
        torch.accelerator.synchronize(device)
        return int(torch.accelerator.max_memory_allocated(device))
    return _status("VmHWM") or int(psutil.Process().memory_info().rss)


def free_memory(device: torch.device) -> int:
    """Returns the bytes that this process can still take on a device.

    On the CPU this is the smallest of what the machine has free, what its container may still take, and what the limit
    of this process leaves.
    """
    if has_allocator(device):
        free, _ = torch.accelerator.get_memory_info(device)
        kept = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
        return int(free + kept)
    rooms = [int(psutil.virtual_memory().available)]
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:
        rooms.append(soft - _status("VmData"))
    most, used = _number(CONTAINER / "memory.max"), _number(CONTAINER / "memory.current")
    if most is not None and used is not None:
        rooms.append(most - used)
    return max(0, min(rooms))


def whole_memory(device: torch.device) -> int:
    """Returns the bytes of a device's memory; of the CPU, what this machine has or its container may take."""
    if has_allocator(device):
        return int(torch.accelerator.get_memory_info(device)[1])
    most = _number(CONTAINER / "memory.max")
    whole = int(psutil.virtual_memory().total)
    return whole if most is None else min(whole, most)


def check_fits(what: str, size: int, device: torch.device, remedy: str) -> None:
    """Compares what something takes with the free memory of a device, before the slow work of loading it.

    Args:
      what: name of the thing, for the message.
      size: bytes that the thing takes at least.
      device: device that shall hold the thing.
      remedy: sentence about what would make the thing fit.

    Raises:
      ConfigError: the device has less.
    """
    free = free_memory(device)
    if size > free:
        raise ConfigError(
            f"device={str(device)!r}: {what} needs {size / GIGABYTE:.2f} GiB {shown(device)} or more, and "
            f"{free / GIGABYTE:.2f} GiB are free; {remedy}"
        )


def has_allocator(device: torch.device) -> bool:
    """Says whether PyTorch counts a device's memory itself, as it does on CUDA and XPU."""
    return device.type in ("cuda", "xpu")


def _status(field: str) -> int:
    """Returns a line of this process's state, bytes; 0 where the system has none."""
    if STATUS.exists():
        for line in STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def shown(device: torch.device | str) -> str:
    """Returns the words for the memory of a device."""
    return "of this process" if str(device) == CPU else f"on {device}"
