"""What a kind of task has to provide."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeAlias

import torch
from torch import nn

_MOST = 700.0  # whose exponential is still a number
# One record: strings, whole numbers, lists of them; an image is uint8 (H, W, 3) or (H, W).
Record: TypeAlias = Mapping[str, Any]


class Batch(Protocol):
    """Examples of which any can be taken; one row is one record, the unit that differential privacy protects."""

    def __len__(self) -> int: ...

    @property
    def targets(self) -> torch.Tensor:
        """How many things each row is scored on, int64 (n,); 0 for an example without a loss."""

    def select(self, indices: Any) -> Self:
        """Returns the rows at the indices, in that order; integers of any sequence, array or tensor, none too."""

    def to(self, device: torch.device | str) -> Self:
        """Returns the examples on a device."""

    def within(self, model: nn.Module) -> Self:
        """Returns the examples with those emptied on which this model would fail, so that it fails on none."""


@dataclass(frozen=True)
class Tally:
    """Sums over scored examples; those of parts add up to those of the whole.

    Attributes:
      loss: sum of the losses of all targets.
      targets: their number.
      metrics: name -> (sum, count) of each further measure; see `means`.
    """

    loss: float
    targets: int
    metrics: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    def __add__(self, other: "Tally") -> "Tally":
        names = [*self.metrics, *(name for name in other.metrics if name not in self.metrics)]
        pairs = {name: (self.metrics.get(name, (0.0, 0)), other.metrics.get(name, (0.0, 0))) for name in names}
        metrics = {name: (one[0] + two[0], one[1] + two[1]) for name, (one, two) in pairs.items()}
        return Tally(self.loss + other.loss, self.targets + other.targets, metrics)

    def means(self) -> dict[str, float]:
        """Returns the value of each measure: sum / count.

        Of "perplexity" it is the exponential of that. All "group/member" are one measure "group", the plain mean of its
        members, as a class weighs as much as another in macro F1; a member that nothing was counted for is left out.
        """
        groups: dict[str, list[float]] = {}
        for name, (total, count) in self.metrics.items():
            values = groups.setdefault(name.partition("/")[0], [])
            values += [total / count] if count else []
        found = {name: sum(values) / len(values) for name, values in groups.items() if values}
        return found | {name: math.exp(min(found[name], _MOST)) for name in ("perplexity",) if name in found}


class Task(Protocol):
    """One kind of model with its data: how it is loaded, encoded and scored.

    A `batch` is always one that this task's own `encode` or `invented` made.

    Attributes:
      name: its key in `task.tasks.TASKS`.
      kind: the key of `emulator.rebuild.AUTO` that loads its models.
      columns: the fields of a record that it reads and the type of each, the main one first; `object` where a name or a
        number may stand.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    columns: ClassVar[Mapping[str, type]]

    def load(self, path: Path | str, *, dtype: torch.dtype) -> Any:
        """Returns the model of a directory, frozen, in eval mode, from safetensors, without network or remote code."""

    def load_processor(self, path: Path | str) -> Any:
        """Returns the tokenizer or image processor of a directory."""

    def encode(self, processor: Any, records: Sequence[Record], *, length: int, split: str, model_config: Any) -> Batch:
        """Returns the records as examples.

        Args:
          processor: of `load_processor`.
          records: each with the fields of `columns`.
          length: most tokens of an example.
          split: name in `task.encode.SPLITS`; tasks whose records are examples take "truncate" only.
          model_config: of the model; names its labels and special tokens.
        """

    def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Returns one loss per example, float32 (B,), differentiable; no example may touch another's.

        Each is the mean over that example's own targets, 0 where it has none; never the `loss` of transformers'
        outputs, which is a mean over the whole batch.
        """

    def tally(self, model: nn.Module, batch: Any) -> Tally:
        """Returns the sums of a batch for evaluation, without gradients."""

    def run(self, model: nn.Module, batch: Any) -> None:
        """Calls a model exactly once with examples, without gradients, for what its blocks do with them."""

    def invented(self, model: nn.Module, length: int, *, seed: int) -> Batch:
        """Returns two records that nobody wrote, of different size where sizes vary, to try a model on.

        Args:
          model: that will get them; must not be called.
          length: most tokens of an example.
          seed: of what they hold; a model that knew it could behave on them alone.
        """
