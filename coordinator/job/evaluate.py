"""The score of a model on some examples, in the task's own measures."""

import functools
import operator
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from offsite.coordinator.job.score import Score
from offsite.errors import DataError
from offsite.task.spec import Batch, Tally, Task


def score(task: Task, model: nn.Module, *parts: Batch, batch: int) -> Score:
    """Returns the score of a model over all parts, computed in chunks of `batch` examples so that memory stays small.

    Raises:
      DataError: no example has a target.
    """
    if not any(part.targets.any() for part in parts):
        raise DataError(
            f"records={sum(map(len, parts))}: no record has anything to learn; give longer records or other records"
        )
    tallies = (task.tally(model, chunk) for part in parts for chunk in _chunks(part, batch))
    total = functools.reduce(operator.add, tallies, Tally(0.0, 0))
    return Score(total.loss / total.targets, total.targets, total.means())


def record_losses(task: Task, model: nn.Module, *parts: Batch, batch: int) -> np.ndarray:
    """Returns each record's sum of losses and number of targets, float64 (n, 2); records without a target are left out.

    The sums of both columns are those of `score`, but for rounding.
    """
    rows = list[np.ndarray]()
    for chunk in (chunk for part in parts for chunk in _chunks(part, batch)):
        with torch.no_grad():
            means = task.losses(model, chunk).double().cpu().numpy()
        targets = chunk.targets.cpu().numpy().astype(np.float64)
        rows.append(np.stack([means * targets, targets], axis=1)[targets > 0])
    return np.concatenate(rows) if rows else np.zeros((0, 2))


def gain_error(before: np.ndarray, after: np.ndarray) -> float | None:
    """Returns the standard error of the gain in mean loss per target, or None of fewer than 2 records.

    The gain is a ratio of sums over records, sum(d) / sum(t) with the difference d of a record's two sums of losses and
    its number of targets t. Its standard error by linearisation (Cochran, Sampling Techniques, 1977, section 6.3) is
    sqrt(n / (n - 1) * sum((d - gain * t)^2)) / sum(t). The same records are scored before and after, so the error is of
    the difference, and does not hold the spread of the losses themselves.

    Args:
      before: `record_losses` of the model before training.
      after: `record_losses` of the tuned model on the same records.
    """
    if len(before) < 2:
        return None
    differences, targets = before[:, 0] - after[:, 0], before[:, 1]
    rest = differences - differences.sum() / targets.sum() * targets
    return float(np.sqrt(len(rest) / (len(rest) - 1) * np.square(rest).sum()) / targets.sum())


def _chunks(examples: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(examples), size):
        yield examples.select(np.arange(start, min(start + size, len(examples))))
