"""Sequence classification: one label for each text."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offsite.errors import UnsupportedModel
from offsite.task.labelled import Labelled, cross_entropy, invented_inputs, token_inputs
from offsite.task.labels import IGNORED, Labels, names_of
from offsite.task.records import check_split
from offsite.task.rows import RowBatch
from offsite.task.spec import Record, Tally


class SequenceClassification(Labelled):
    """The task of models with a head for one label per text; one target per example."""

    name: ClassVar[str] = "sequence_classification"
    kind: ClassVar[str] = "sequence_classification"
    columns: ClassVar[Mapping[str, type]] = {"text": str, "label": object}

    def encode(
        self, processor: Any, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> RowBatch:
        """Returns labelled texts as examples, cut and padded on the right; one without tokens has no target.

        Raises:
          ConfigError: the length does not fit the model, or the split is not "truncate".
          DataError: there is no record, or a label is none of the model's.
          UnsupportedModel: see `task.labels.names_of`; or the model has a decoder.
        """
        check_split(split, self.name)
        if getattr(model_config, "is_encoder_decoder", False):
            raise UnsupportedModel(
                "is_encoder_decoder=true: such a model finds its label by the end-of-text tokens of the whole batch, "
                "so examples depend on each other; use an encoder"
            )
        labels = Labels(model_config).of(records, "label")
        found = processor.singles([record["text"] for record in records], length)
        known = [label if one.ids else IGNORED for label, one in zip(labels, found, strict=True)]
        return RowBatch(token_inputs(found, length, model_config), torch.tensor(known, dtype=torch.long))

    def sums(self, model: nn.Module, batch: RowBatch) -> Tensor:
        """Returns the loss of each example's label, nats, (B,)."""
        return cross_entropy(model(**batch.inputs).logits, batch.labels)

    def tally(self, model: nn.Module, batch: RowBatch) -> Tally:
        """Returns loss, accuracy, balanced accuracy and macro F1; see `class_tally`."""
        with torch.no_grad():
            return class_tally(model(**batch.inputs).logits, batch.labels)

    def invented(self, model: nn.Module, length: int, *, seed: int) -> RowBatch:
        """Returns two labelled records that nobody wrote."""
        generator = torch.Generator().manual_seed(seed)
        inputs = invented_inputs(model, length, generator)
        return RowBatch(inputs, torch.randint(len(names_of(model.config)), (2,), generator=generator))


def class_tally(logits: Tensor, labels: Tensor) -> Tally:
    """Returns the sums behind loss, accuracy, balanced accuracy and macro F1.

    Balanced accuracy is the mean of the classes' recalls (Brodersen et al. 2010), macro F1 the mean of their F1; the
    sums of each class add up over batches, the means do not.

    Args:
      logits: floating (B, classes).
      labels: int64 (B,), `IGNORED` where nothing is scored.
    """
    scored = labels != IGNORED
    truth, guess = labels[scored], logits[scored].argmax(dim=1)
    classes = logits.shape[1]
    found = torch.bincount(truth[truth == guess], minlength=classes).tolist()
    actual, called = (
        torch.bincount(truth, minlength=classes).tolist(),
        torch.bincount(guess, minlength=classes).tolist(),
    )
    metrics: dict[str, tuple[float, int]] = {"accuracy": (float(sum(found)), len(truth))}
    for number in range(classes):
        metrics[f"balanced_accuracy/{number}"] = (float(found[number]), actual[number])
    for number in range(classes):
        metrics[f"macro_f1/{number}"] = (2.0 * found[number], actual[number] + called[number])
    return Tally(float(cross_entropy(logits, labels).double().sum()), len(truth), metrics)
