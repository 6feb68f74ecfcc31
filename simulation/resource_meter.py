"""Seconds and peak memory of each phase of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from offsite.coordinator.report.model import PhaseCost
from offsite.task.device import CPU
from offsite.task.device_memory import held_at_most, reset_peak


@dataclass
class Phase:
    """The cost of one phase.

    Attributes:
      bytes_up: bytes from all sites.
      bytes_down: bytes to all sites.
      seconds: duration of the phase.
      peak_rss_bytes: peak resident memory of this process, in bytes.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0


class Meter:
    """Measures phases one after the other."""

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Measures the body of a `with` statement; a phase that is entered again adds up."""
        phase = self.phases.setdefault(name, Phase())
        reset_peak(torch.device(CPU))
        began = time.monotonic()
        try:
            yield phase
        finally:
            phase.seconds = round(phase.seconds + time.monotonic() - began, 3)
            phase.peak_rss_bytes = max(phase.peak_rss_bytes, held_at_most(torch.device(CPU)))

    def costs(self) -> dict[str, PhaseCost]:
        """Returns the costs of all phases and their total, with the largest peak memory of any phase as the total's."""
        phases = list(self.phases.values())
        total = Phase(
            bytes_up=sum(phase.bytes_up for phase in phases),
            bytes_down=sum(phase.bytes_down for phase in phases),
            seconds=round(sum(phase.seconds for phase in phases), 3),
            peak_rss_bytes=max((phase.peak_rss_bytes for phase in phases), default=0),
        )
        return {
            name: PhaseCost(phase.bytes_up, phase.bytes_down, phase.seconds, phase.peak_rss_bytes)
            for name, phase in (*self.phases.items(), ("total", total))
        }
