"""A site's own log of its training, which stays at the site."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from offsite.client.training.local_update import Trained
from offsite.errors import DataError


def to_json(trained: Trained, *, number: int, site: str, steps: int) -> dict[str, Any]:
    """Returns one training as plain values for JSON; a number that is not finite becomes None."""
    outcome = trained.outcome
    return {
        "round": number,
        "site": site,
        "losses": [_number(loss) for loss in outcome.losses],
        "batch_sizes": list(outcome.batch_sizes),
        "median_norm": _number(outcome.norm_median),
        "clipped_fraction": outcome.clipped_fraction,
        "dropped": outcome.dropped,
        "bounded": trained.bounded,
        "engine": trained.engine,
        "steps": steps,
    }


def append(path: Path, line: dict[str, Any]) -> None:
    """Adds a line to the log.

    Raises:
      DataError: the disk is full.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise DataError(f"training_log={path.name}: cannot be written ({error.strerror}); free disk space") from error


def _number(value: float) -> float | None:
    """Returns a number as JSON can hold it: None where the number is not finite."""
    return value if np.isfinite(value) else None
