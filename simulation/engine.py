"""The interface of a simulation's engine, which carries the rounds between the coordinator and the sites."""

from collections.abc import Callable, Mapping
from typing import Protocol

from offsite.client.training.emulator_session import EmulatorSession
from offsite.coordinator.job.round_record import RoundRecord
from offsite.coordinator.job.store import Progress
from offsite.coordinator.rounds.exchange import Exchange
from offsite.protos.job_manifest import JobManifest
from offsite.simulation.run_folder import Run


class Display(Protocol):
    """The progress of a run, shown to the person at the terminal."""

    def step(self, text: str) -> None:
        """Shows the step that begins now."""

    def call(self, stage: str, site: str) -> None:
        """Shows a site and the stage that the site begins."""

    def round(self, record: RoundRecord, planned: int) -> None:
        """Shows a finished round."""


Sessions = Mapping[str, EmulatorSession]
"""The opened emulator of each site, by site."""

Engine = Callable[[Run, JobManifest, Sessions, Display, Callable[[Exchange], Progress]], Progress]
"""Makes an exchange with the sites of a run, runs the rounds over this exchange, and returns the progress."""
