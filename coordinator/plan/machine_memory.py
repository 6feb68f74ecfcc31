"""The memory of a device of this machine."""

import os
from pathlib import Path

import torch

from offsite.task.device import CPU

LIMIT = Path("/sys/fs/cgroup/memory.max")  # memory that a container may take


def machine_memory(device: torch.device) -> int:
    """Returns the bytes of a device's memory; of the CPU, what this machine has or its container may take."""
    if device.type != CPU:
        return int(torch.accelerator.get_memory_info(device)[1])
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(whole, int(LIMIT.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no such limit
        return whole
