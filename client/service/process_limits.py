"""The owner's limits on the client's process and its children."""

import os
import resource
from pathlib import Path

from offsite.client.home.package_room import GIGABYTE
from offsite.client.home.policy import Policy
from offsite.errors import DataError

SHARE = 0.75  # of the machine's memory, where the owner names no number
CONTAINER = Path("/sys/fs/cgroup/memory.max")  # a container's own limit, or the word max


def limit_resources(policy: Policy) -> None:
    """Keeps this process, and every process that it starts later, within the owner's limits on threads and memory.

    Raises:
      DataError: the operating system refuses a limit.
    """
    if policy.max_threads:
        import torch

        torch.set_num_threads(policy.max_threads)
        os.environ["OMP_NUM_THREADS"] = str(policy.max_threads)
    size = int(policy.max_memory_gb * GIGABYTE) or int(SHARE * machine_memory())
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if not policy.max_memory_gb and hard != resource.RLIM_INFINITY:
        size = min(size, hard)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    except (ValueError, OSError, OverflowError) as error:
        raise DataError(f"max_memory_gb={policy.max_memory_gb}: the system refuses this limit ({error})") from error


def machine_memory() -> int:
    """Returns the bytes of memory that this machine has, or that its container may use where that is less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = CONTAINER.read_text(encoding="ascii").strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdigit() else machine
