"""A display for callers of the Python interface; it passes steps and rounds as sentences to the caller's function."""

from collections.abc import Callable
from dataclasses import dataclass

from offsite.coordinator.job.round_record import RoundRecord


@dataclass(frozen=True)
class StepDisplay:
    """A display that passes each step to a function, and shows nothing itself.

    Attributes:
      on_step: function that takes one sentence for each step.
    """

    on_step: Callable[[str], None]

    def step(self, text: str) -> None:
        """Passes the sentence of a step to the function."""
        self.on_step(text)

    def call(self, stage: str, site: str) -> None:
        """Passes the name of the site that trains; nothing is passed for the short stages."""
        if stage == "train":
            self.on_step(f"train at {site}")

    def round(self, record: RoundRecord, planned: int) -> None:
        """Passes the number of a round that is whole."""
        self.on_step(f"round {record.round} of {planned}")
