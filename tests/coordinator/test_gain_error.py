"""The standard error of a gain, by another route: the bootstrap over records; and the words of the report."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from offsite.coordinator.job.evaluate import gain_error, record_losses, score
from offsite.coordinator.report.quality_facts import Quality
from offsite.coordinator.report.summary import summarise
from offsite.task.examples import Examples
from offsite.task.tasks import TASKS
from tests.coordinator.test_report import sample, with_plug_in


def drawn(seed: int, records: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Sums of losses and targets of records before and after a training."""
    draw = np.random.default_rng(seed)
    targets = draw.integers(1, 30, records).astype(float)
    before = draw.gamma(4.0, 1.0, records) * targets
    after = before - draw.normal(0.05, 0.6, records) * targets
    return np.stack([before, targets], axis=1), np.stack([after, targets], axis=1)


def test_it_is_the_spread_of_the_gain_over_redrawn_records() -> None:
    before, after = drawn(0)
    draw, gains = np.random.default_rng(1), []
    for _ in range(2000):
        rows = draw.integers(0, len(before), len(before))
        gains.append((before[rows, 0] - after[rows, 0]).sum() / before[rows, 1].sum())
    error = gain_error(before, after)
    assert error == pytest.approx(np.std(gains), rel=0.1)
    plain = np.std(before[:, 0] / before[:, 1]) / 20
    assert error != pytest.approx(plain, rel=0.5)  # the spread of the losses themselves is not in it


def test_records_with_as_many_targets_give_the_textbooks_error_of_a_mean() -> None:
    before, after = (
        np.stack([values, np.full(50, 7.0)], axis=1) for values in np.random.default_rng(2).random((2, 50))
    )
    means = (before[:, 0] - after[:, 0]) / 7
    assert gain_error(before, after) == pytest.approx(np.std(means, ddof=1) / np.sqrt(50))


def test_one_record_has_no_error() -> None:
    one = np.array([[3.0, 2.0]])
    assert gain_error(one, one) is None


def test_the_records_losses_add_up_to_the_score(fed: Path) -> None:
    task = TASKS["causal_lm"]
    model = task.load(fed.parent / "model", dtype=torch.float32)
    ids = torch.randint(3, 60, (5, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9)[None, :] < torch.tensor([9, 4, 0, 7, 2])[:, None]).long()
    examples = Examples(ids * mask, mask)
    rows = record_losses(task, model, examples, batch=2)
    whole = score(task, model, examples, batch=2)
    assert rows[:, 1].tolist() == [8.0, 3.0, 6.0, 1.0]  # the empty record is left out
    assert rows[:, 0].sum() / rows[:, 1].sum() == pytest.approx(whole.loss, rel=1e-6)


@pytest.mark.parametrize(
    ("error", "noise"), [(None, False), (0.0, False), (0.04, False), (0.06, True), (5.0, True)], ids=str
)
def test_a_gain_of_less_than_two_errors_is_said_to_be_within_noise(error: float | None, noise: bool) -> None:
    base = sample().quality
    assert base.private is not None
    before = base.private.full_zero_shot.loss
    report = with_plug_in(sample(), before - 0.1)
    quality = dataclasses.replace(report.quality, gain_error=error)
    assert quality.within_noise is noise
    answer = summarise(dataclasses.replace(report, quality=quality)).answer[0]
    assert ("within noise" in answer) is noise
    assert ("is not measurably better or worse on private" in answer) is noise
    assert ("is better on private" in answer) is not noise


def test_it_is_not_known_where_private_scores_are_not() -> None:
    assert not Quality(sample().quality.public, gain_error=1.0).within_noise
