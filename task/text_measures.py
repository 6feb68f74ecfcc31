"""Measures of generated texts against the right texts: ROUGE, chrF and exact match; importing this loads no library."""

import importlib.util
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from offsite.errors import ConfigError, lookup
from offsite.task import rouge
from offsite.task.answer_text import exact_match
from offsite.task.record_fields import WITHOUT_TEXT

KEY = "evaluation.measures"
Values: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class TextMeasure:
    """One measure of the key `evaluation.measures`.

    Attributes:
      names: names of the values in a report.
      package: package that has to be installed, by the extra `measures`; empty without one.
      values: function from n generated and n right texts, n >= 1, to the values of all n, and below them the values
        without each of the n, float64 (1 + n, len(names)); of one record alone (1, len(names)).
    """

    names: tuple[str, ...]
    package: str
    values: Callable[[Sequence[str], Sequence[str]], Values]


def _rouge(outputs: Sequence[str], references: Sequence[str]) -> Values:
    return _means([rouge.rouge(output, right) for output, right in zip(outputs, references, strict=True)])


def _exact(outputs: Sequence[str], references: Sequence[str]) -> Values:
    return _means([(exact_match(output, right),) for output, right in zip(outputs, references, strict=True)])


def _chrf(outputs: Sequence[str], references: Sequence[str]) -> Values:
    """Returns chrF2 of a whole corpus (Popovic 2015), from 0 to 100, by sacrebleu's defaults."""
    from sacrebleu.metrics.chrf import CHRF

    metric, count = CHRF(), len(outputs)
    chosen = [range(count), *([k for k in range(count) if k != out] for out in range(count) if count > 1)]
    scores = [metric.corpus_score([outputs[k] for k in own], [[references[k] for k in own]]).score for own in chosen]
    return np.array(scores, dtype=np.float64)[:, None]


def _means(rows: Sequence[tuple[float, ...]]) -> Values:
    each, count = np.array(rows, dtype=np.float64), len(rows)
    whole = each.mean(axis=0, keepdims=True)
    return whole if count == 1 else np.concatenate([whole, (count * whole - each) / (count - 1)])


MEASURES: dict[str, TextMeasure] = {
    "rouge": TextMeasure(rouge.NAMES, "", _rouge),
    "chrf": TextMeasure(("chrf",), "sacrebleu", _chrf),
    "exact_match": TextMeasure(("exact_match",), "", _exact),
}


@dataclass(frozen=True)
class Comparison:
    """Values of a measure for the texts of two models on the same records.

    Attributes:
      before: value of the first model.
      after: value of the second model.
      error: standard error of `after` - `before` over the records; None of fewer than 2 records.
    """

    before: float
    after: float
    error: float | None


def compare(
    measures: Sequence[str], before: Sequence[str], after: Sequence[str], references: Sequence[str]
) -> dict[str, Comparison]:
    """Compares the texts of two models, by the name of each value.

    The error is by the jackknife over the records (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    section 11.2), which for a mean is the standard deviation of the differences / sqrt(n). All texts are brought to
    Unicode's composed form first, so that an accent counts once however a file writes it.

    Args:
      measures: keys of `MEASURES`.
      before: texts of the first model.
      after: texts of the second model on the same records.
      references: the right texts, at least 1.
    """
    first, second, right = (
        [unicodedata.normalize("NFC", text) for text in texts] for texts in (before, after, references)
    )
    found = dict[str, Comparison]()
    for measure in (MEASURES[name] for name in dict.fromkeys(measures)):
        old, new = measure.values(first, right), measure.values(second, right)
        for name, mine, its in zip(measure.names, old.T, new.T, strict=True):
            found[name] = Comparison(float(mine[0]), float(its[0]), _error(its[1:] - mine[1:]))
    return found


def _error(without: Values) -> float | None:
    """Returns the standard error of a value from its n values without each record; None of fewer than 2."""
    count = len(without)
    if count < 2:
        return None
    return float(np.sqrt((count - 1) / count * np.square(without - without.mean()).sum()))


def check_measures(measures: Sequence[str], task: str) -> None:
    """Checks the measures that a federation file asks for, before any work.

    Args:
      measures: value of the key `evaluation.measures`.
      task: name of the task.

    Raises:
      UnknownName: there is no such measure.
      ConfigError: the task's models give no text, or the package of a measure is not installed.
    """
    chosen = [lookup(MEASURES, name, KEY) for name in measures]
    if chosen and task in WITHOUT_TEXT:
        raise ConfigError(
            f"{KEY}={list(measures)}: the task {task!r} generates no text, since {WITHOUT_TEXT[task]}", key=KEY
        )
    for name, measure in zip(measures, chosen, strict=True):
        if measure.package and importlib.util.find_spec(measure.package) is None:
            raise ConfigError(
                f"{KEY}={list(measures)}: {name!r} needs the package {measure.package}, which is not installed; run "
                "pip install 'offsite[measures]', or leave the measure out",
                key=KEY,
            )
