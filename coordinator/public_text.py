"""The coordinator's public examples, by what they are for."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coordinator.config import FedConfig
from coordinator.evaluate import spread, spread_rows
from errors import DataError
from task.examples import Examples
from task.spec import Task

CALIBRATION_EXAMPLES = 64
GATE_EXAMPLES = 8
CLIP_EXAMPLES = 16


@dataclass(frozen=True)
class PublicText:
    """Public examples by purpose: even ones tune, odd ones test, so that nothing is tested on what it was tuned on.

    Attributes:
      calibration: what compressors are fitted to.
      tune: for the gate and the clip.
      test: for every score.
    """

    calibration: Examples
    tune: Examples
    test: Examples


def public_text(config: FedConfig, task: Task, tokenizer: Any, texts: list[str]) -> PublicText:
    """Returns the public examples: even ones tune, odd ones test.

    Raises:
      DataError: too little public text.
    """
    examples = task.encode(tokenizer, texts, length=config.data.length, split=config.data.split)
    examples = examples.select(torch.nonzero(examples.targets))  # the others have no gradient to measure
    needed = 2 * max(CLIP_EXAMPLES, config.evaluation.public_examples)
    if len(examples) < needed:
        raise DataError(f"public records={len(examples)}: at least {needed} are needed; give more public text")
    tune = spread_rows(np.arange(0, len(examples), 2), max(CLIP_EXAMPLES, GATE_EXAMPLES))
    others = np.setdiff1d(np.arange(0, len(examples), 2), tune)
    return PublicText(
        # Where there is no more text than the tests need, a fit and the gate look at the same.
        calibration=examples.select(spread_rows(others if len(others) else tune, CALIBRATION_EXAMPLES)),
        tune=examples.select(tune),
        test=spread(examples, config.evaluation.public_examples, offset=1, stride=2),
    )
