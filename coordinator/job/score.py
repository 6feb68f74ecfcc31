"""How good a model is: the numbers, without the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """How good a model is.

    Attributes:
      loss: mean over all targets, nats.
      targets: number of targets.
      metrics: further measures of the task, by name; see `task.spec.Tally.means`.
    """

    loss: float
    targets: int
    metrics: Mapping[str, float] = field(default_factory=dict)
