"""What a simulated site wrote about its own training; only a simulation may read it."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from offsite.coordinator.job.json_form import decode


@dataclass(frozen=True)
class SiteRound:
    """One training of one site. The fields are those keys of the site's `rounds.jsonl` that a report needs.

    Attributes:
      round: number of the round.
      steps: training steps.
      engine: how each record's own contribution was found.
      clipped_fraction: share of drawn records whose contribution was clipped.
      losses: mean loss of each step's batch; None where the batch was empty.
    """

    round: int
    steps: int
    engine: str
    clipped_fraction: float
    losses: tuple[float | None, ...]

    @property
    def mean_loss(self) -> float | None:
        """Mean over the steps that have a loss, or None where no step has one."""
        known = [loss for loss in self.losses if loss is not None and np.isfinite(loss)]
        return float(np.mean(known)) if known else None


def read_site_log(path: Path) -> tuple[SiteRound, ...]:
    """Returns the rounds of one site, in order.

    A round that was done again after a kill stands there twice; with the same seed it was the same computation, so it
    is one release and counts once.

    Raises:
      DataError: a line is not of this form.
    """
    if not path.exists():
        return ()
    lines = (json.loads(text) for text in path.read_text(encoding="utf-8").splitlines())
    rounds = (decode(SiteRound, content, path.name) for content in lines)
    return tuple({one.round: one for one in rounds}.values())
