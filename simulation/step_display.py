"""A display for callers of the Python interface: steps and rounds as sentences to a function of the caller's."""

from collections.abc import Callable
from dataclasses import dataclass

from offsite.coordinator.job.round_record import RoundRecord


@dataclass(frozen=True)
class StepDisplay:
    """Passes each step on and shows nothing.

    Attributes:
      on_step: function that receives one sentence for each step.
    """

    on_step: Callable[[str], None]

    def step(self, text: str) -> None:
        """Passes a step on."""
        self.on_step(text)

    def call(self, stage: str, site: str) -> None:
        """Says which site trains; the short stages pass in silence."""
        if stage == "train":
            self.on_step(f"train at {site}")

    def round(self, record: RoundRecord, planned: int) -> None:
        """Says that a round is whole."""
        self.on_step(f"round {record.round} of {planned}")
