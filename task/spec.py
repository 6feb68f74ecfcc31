"""The protocols of a task and of its batches, and the sums that an evaluation collects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeAlias

if TYPE_CHECKING:  # records are read where no model is
    import torch
    from torch import nn

_MAX_EXPONENT = 700.0  # a larger exponent would overflow a float
# One record: fields hold strings, whole numbers, lists, or arrays; an image is uint8 (H, W, 3) or (H, W).
Record: TypeAlias = Mapping[str, Any]


class Batch(Protocol):
    """Encoded examples; each row is one record, the unit that differential privacy protects."""

    def __len__(self) -> int: ...

    @property
    def targets(self) -> torch.Tensor:
        """Number of scored targets of each row, int64 (n,); 0 for an example without a loss."""

    def select(self, indices: Any) -> Self:
        """Returns the rows at integer indices, in that order; a sequence, an array or a tensor, which may be empty."""

    def to(self, device: torch.device | str) -> Self:
        """Returns the examples on a device."""

    def within(self, model: nn.Module) -> Self:
        """Returns the examples; each example on which this model would fail is replaced by one without a target."""

    def emptied(self, rows: Sequence[int]) -> Self:
        """Returns the examples; those at the indices `rows` have no target."""


@dataclass(frozen=True)
class Tally:
    """Sums over scored examples; the tallies of all parts add up to the tally of the whole.

    Attributes:
      loss: sum of the losses of all targets.
      targets: number of targets, >= 0.
      metrics: name -> (sum, count) of each further measure; see `means`.
    """

    loss: float
    targets: int
    metrics: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        names = [*self.metrics, *(name for name in other.metrics if name not in self.metrics)]
        pairs = {name: (self.metrics.get(name, (0.0, 0)), other.metrics.get(name, (0.0, 0))) for name in names}
        metrics = {name: (mine[0] + its[0], mine[1] + its[1]) for name, (mine, its) in pairs.items()}
        return Tally(self.loss + other.loss, self.targets + other.targets, metrics)

    def means(self) -> dict[str, float]:
        """Returns the value of each measure: sum / count.

        "perplexity" is the exponential of sum / count. All names "group/member" form one measure "group", which is the
        plain mean of its members, since in macro F1 every class has the same weight. A member with count 0 is left out.
        """
        groups: dict[str, list[float]] = {}
        for name, (total, count) in self.metrics.items():
            values = groups.setdefault(name.partition("/")[0], [])
            values += [total / count] if count else []
        means = {name: sum(values) / len(values) for name, values in groups.items() if values}
        return means | {name: math.exp(min(means[name], _MAX_EXPONENT)) for name in ("perplexity",) if name in means}


class Task(Protocol):
    """One kind of model with its data: loads a model, encodes records, and computes losses and metrics.

    Every argument `batch` comes from this task's own `encode` or `dummy_batch`.

    Attributes:
      name: key in `task.tasks.TASKS`.
      kind: key in `task.kinds.KINDS` of the class that loads the models, or "diffusion".
      columns: the fields of a record that the task reads, with their types, the main field first; `object` stands for a
        name, a number or an array.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    columns: ClassVar[Mapping[str, type]]

    def load(self, path: Path | str, *, dtype: torch.dtype) -> Any:
        """Returns the model of a directory, frozen and in eval mode; safetensors only, no network, no remote code."""

    def load_processor(self, path: Path | str) -> Any:
        """Returns the tokenizer or image processor of a directory."""

    def encode(self, processor: Any, records: Sequence[Record], *, length: int, split: str, model_config: Any) -> Batch:
        """Returns the records as examples.

        Args:
          processor: tokenizer or image processor from `load_processor`.
          records: records with the fields of `columns`.
          length: maximum number of tokens of an example, >= 1.
          split: name in `task.splits.SPLITS`; a task whose records are its examples takes "truncate" only.
          model_config: configuration of the model, with its labels and special tokens.
        """

    def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Returns one loss for each example, float32 (B,), differentiable; no loss may depend on another example.

        A loss is the mean over the example's own targets, and 0 for an example without a target. The `loss` of
        transformers' outputs is a mean over the whole batch, and must not be used.
        """

    def tally(self, model: nn.Module, batch: Any) -> Tally:
        """Returns the sums of a batch for an evaluation, without gradients."""

    def run(self, model: nn.Module, batch: Any) -> None:
        """Calls a model exactly once with examples, without gradients, so that hooks see the activations."""

    def dummy_batch(self, model: nn.Module, length: int, *, seed: int) -> Batch:
        """Returns two random records for a trial of a model, of different sizes where sizes vary.

        Args:
          model: the model that will get the records; must not be called here.
          length: maximum number of tokens of an example, >= 1.
          seed: secret seed of the content; a model that knew the seed could behave well on these records only.
        """
