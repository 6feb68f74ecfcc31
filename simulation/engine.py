"""What an engine of a simulation is: it carries the rounds between the coordinator and the sites."""

from collections.abc import Callable, Mapping
from typing import Protocol

from offsite.client.training.emulator_session import EmulatorSession
from offsite.coordinator.job.round_record import RoundRecord
from offsite.coordinator.job.store import Progress
from offsite.coordinator.rounds.exchange import Exchange
from offsite.protos.job_manifest import JobManifest
from offsite.simulation.run_folder import Run


class Display(Protocol):
    """What a run shows to the person at the terminal."""

    def step(self, text: str) -> None:
        """Says what is being done now."""

    def call(self, stage: str, site: str) -> None:
        """Says which site is at which stage."""

    def round(self, record: RoundRecord, planned: int) -> None:
        """Shows a finished round."""


Sessions = Mapping[str, EmulatorSession]
"""The emulator of each site, opened."""

Engine = Callable[[Run, JobManifest, Sessions, Display, Callable[[Exchange], Progress]], Progress]
"""Makes an exchange with the sites of a run, and runs the rounds over it."""
