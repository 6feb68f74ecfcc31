"""The score of a model: the numbers, without the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from offsite.task.text_measures import Comparison


@dataclass(frozen=True)
class GeneratedScores:
    """Measures of the texts that the full model generates, before and after training, on the same records.

    Attributes:
      part: part of the records: `HELD_OUT` or `PUBLIC` of `task.nothing_to_learn`.
      records: number of records for which texts were generated.
      left_out: number of further records that hold no prompt with room or no right text.
      new_tokens: largest number of tokens of a text.
      unfinished_before, unfinished_after: number of texts that came to this number without an end of their own.
      measures: values by name; empty where no record was left.
    """

    part: str
    records: int
    left_out: int
    new_tokens: int
    unfinished_before: int
    unfinished_after: int
    measures: Mapping[str, Comparison]


@dataclass(frozen=True)
class Score:
    """The quality of a model on some examples.

    Attributes:
      loss: mean loss over all targets, in the task's unit.
      targets: number of targets.
      metrics: further measures of the task by name; see `task.spec.Tally.means`.
    """

    loss: float
    targets: int
    metrics: Mapping[str, float] = field(default_factory=dict)
