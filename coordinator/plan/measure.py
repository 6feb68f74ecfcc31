"""Measures one device: a few seconds of the operations on which a job spends its time."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import torch

from offsite.coordinator.plan.device_profile import DeviceProfile
from offsite.emulator.compressors.gptq import InputMoments, quantize_rows, second_moments
from offsite.emulator.package.quantization_scheme import Scheme
from offsite.emulator.package.quantize import quantize
from offsite.privacy.randomness import Randomness
from offsite.secagg import mask
from offsite.task.device import CPU, choose_device
from offsite.task.device_memory import whole_memory

PATIENCE = 0.3  # seconds of one measurement
WIDTH, ROWS = 1024, 512
NUMBERS = 1 << 24  # more than a cache holds
CODES = Scheme(4, 64)


def measure_profile(name: str, on_step: Callable[[str], None] = lambda text: None) -> DeviceProfile:
    """Returns the profile of a device of this machine.

    Args:
      name: name of the device, as `compute.device`.
      on_step: function that takes what is being measured.

    Raises:
      ConfigError: there is no such device.
    """
    from offsite.privacy import optimizer  # noqa: F401 - a site has Opacus in memory, and `imports` counts it

    device, imports = choose_device(name), _imports()
    on_step(f"measure products and sums on {device}")
    left, right = (torch.randn(ROWS, WIDTH, device=device), torch.randn(WIDTH, WIDTH, device=device))
    numbers = torch.randn(NUMBERS, device=device)
    flops = 2 * ROWS * WIDTH * WIDTH / _time(lambda: left @ right, device)
    traffic = 3 * numbers.nbytes / _time(lambda: numbers * numbers, device)
    on_step("measure rounding")
    weight = right.cpu()
    moments = InputMoments.of(second_moments(torch.randn(2 * WIDTH, WIDTH)))
    rounding = weight.numel() / _time(lambda: quantize(weight, CODES))
    fitting = weight.numel() / _time(lambda: quantize_rows(weight, moments, CODES))
    on_step("measure masks, noise and files")
    ring, random = np.zeros(NUMBERS, np.uint32), Randomness.from_os()
    masking = NUMBERS / _time(lambda: mask.add(ring, os.urandom(mask.KEY_BYTES)))
    noise = NUMBERS / _time(lambda: random.normal(NUMBERS))
    return DeviceProfile(
        device=str(device),
        memory=whole_memory(device),
        threads=torch.get_num_threads(),
        imports=imports,
        flops=flops,
        traffic=traffic,
        reading=_reading(),
        rounding=rounding,
        fitting=fitting,
        masking=masking,
        noise=noise,
    )


def _time(call: Callable[[], object], device: torch.device | None = None) -> float:
    """Returns the seconds of one call: the least of the calls that fit into a moment, after one that warms up."""
    call()
    best, until = float("inf"), time.perf_counter() + PATIENCE
    while time.perf_counter() < until:
        start = time.perf_counter()
        call()
        if device is not None and device.type != CPU:
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _imports() -> int:
    """Returns the resident bytes of this process, which has imported what a site and a coordinator need."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _reading() -> float:
    """Returns the bytes of a file that are read and hashed in a second."""
    with NamedTemporaryFile() as file:
        file.write(os.urandom(1 << 24))
        file.flush()
        return (1 << 24) / _time(lambda: hashlib.sha256(Path(file.name).read_bytes()))
