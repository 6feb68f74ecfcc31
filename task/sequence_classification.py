"""Sequence classification: one label for each text."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offsite.errors import UnsupportedModel
from offsite.task.device import device_of
from offsite.task.labelled import Labelled, cross_entropy, dummy_inputs, token_inputs
from offsite.task.labels import IGNORED, names_of
from offsite.task.record_fields import FIELDS
from offsite.task.records import check_split
from offsite.task.rows import RowBatch
from offsite.task.spec import Record, Tally
from offsite.task.token_rows import labelled_texts


class SequenceClassification(Labelled):
    """The task of models with a head for one label of each text; one target for each example."""

    name: ClassVar[str] = "sequence_classification"
    kind: ClassVar[str] = "sequence_classification"
    columns: ClassVar[Mapping[str, type]] = FIELDS["sequence_classification"]

    def encode(
        self, processor: Any, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> RowBatch:
        """Returns labelled texts as examples, cut and padded on the right; an example without tokens has no target.

        Raises:
          ConfigError: the length does not fit the model, or the split is not "truncate".
          DataError: there is no record, or a label is not a label of the model.
          UnsupportedModel: the model has a decoder, or no usable labels; see `task.labels.names_of`.
        """
        check_split(split, self.name)
        if getattr(model_config, "is_encoder_decoder", False):
            raise UnsupportedModel(
                "is_encoder_decoder=true must be false, because such a model finds its label by the end-of-text tokens "
                "of the whole batch, so examples would depend on each other; choose an encoder"
            )
        texts, labels = labelled_texts(processor, records, length, model_config)
        return RowBatch(token_inputs(texts, length, model_config), torch.tensor(labels, dtype=torch.long))

    def sums(self, model: nn.Module, batch: RowBatch) -> Tensor:
        """Returns the loss of each example's label, nats, (B,)."""
        return cross_entropy(model(**batch.inputs).logits, batch.labels)

    def tally(self, model: nn.Module, batch: RowBatch) -> Tally:
        """Returns loss, accuracy, balanced accuracy and macro F1; see `class_tally`."""
        batch = batch.to(device_of(model))
        with torch.no_grad():
            return class_tally(model(**batch.inputs).logits, batch.labels)

    def dummy_batch(self, model: nn.Module, length: int, *, seed: int) -> RowBatch:
        """Returns two random records with random labels."""
        generator = torch.Generator().manual_seed(seed)
        inputs = dummy_inputs(model, length, generator)
        return RowBatch(inputs, torch.randint(len(names_of(model.config)), (2,), generator=generator))


def class_tally(logits: Tensor, labels: Tensor) -> Tally:
    """Returns the sums behind loss, accuracy, balanced accuracy and macro F1.

    Balanced accuracy is the mean of the classes' recalls (Brodersen et al. 2010), and macro F1 is the mean of the
    classes' F1. The sums of each class add up over batches; the means do not.

    Args:
      logits: scores of the classes, floating (B, classes).
      labels: numbers of labels, int64 (B,), `IGNORED` where nothing is scored.
    """
    scored = labels != IGNORED
    truth, guess = labels[scored], logits[scored].argmax(dim=1)
    classes = logits.shape[1]
    hits = torch.bincount(truth[truth == guess], minlength=classes).tolist()
    actual, predicted = (
        torch.bincount(truth, minlength=classes).tolist(),
        torch.bincount(guess, minlength=classes).tolist(),
    )
    metrics: dict[str, tuple[float, int]] = {"accuracy": (float(sum(hits)), len(truth))}
    for number in range(classes):
        metrics[f"balanced_accuracy/{number}"] = (float(hits[number]), actual[number])
    for number in range(classes):
        metrics[f"macro_f1/{number}"] = (2.0 * hits[number], actual[number] + predicted[number])
    return Tally(float(cross_entropy(logits, labels).double().sum()), len(truth), metrics)
