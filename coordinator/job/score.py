"""The score of a model: the numbers, without the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field


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
