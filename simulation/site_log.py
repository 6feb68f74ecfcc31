"""The log of a simulated site about its own training, which only a simulation may read."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from offsite.coordinator.job.json_form import decode


@dataclass(frozen=True)
class SiteRound:
    """One training of one site. The fields are the keys of the site's `rounds.jsonl` that a report needs.

    Attributes:
      round: number of the round, from 1.
      steps: number of training steps.
      engine: name of the engine that computes each record's own contribution.
      clipped_fraction: share of drawn records whose contribution was clipped, from 0 to 1.
      losses: mean loss of each step's batch, in the task's unit; None where the batch was empty.
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

    A round that was trained again after a kill stands twice in the log. With the same seed both are the same
    computation and so one release, which counts once.

    Raises:
      DataError: a line is not a round of a site.
    """
    if not path.exists():
        return ()
    lines = (json.loads(text) for text in path.read_text(encoding="utf-8").splitlines())
    rounds = (decode(SiteRound, content, path.name) for content in lines)
    return tuple({entry.round: entry for entry in rounds}.values())
