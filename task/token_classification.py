"""Token classification: one label for each word, for example for named entities."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offsite.task.device import device_of
from offsite.task.encode import padded
from offsite.task.entities import Tagging
from offsite.task.labelled import Labelled, cross_entropy, dummy_inputs, token_inputs
from offsite.task.labels import IGNORED, names_of
from offsite.task.record_fields import FIELDS
from offsite.task.records import check_split
from offsite.task.rows import RowBatch
from offsite.task.spec import Record, Tally
from offsite.task.token_rows import labelled_words


class TokenClassification(Labelled):
    """The task of models with a head for one label of each token; a word's label is learnt at its first token."""

    name: ClassVar[str] = "token_classification"
    kind: ClassVar[str] = "token_classification"
    columns: ClassVar[Mapping[str, type]] = FIELDS["token_classification"]

    def encode(
        self, processor: Any, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> RowBatch:
        """Returns labelled words as examples, cut and padded on the right.

        Raises:
          ConfigError: the length does not fit the model, or the split is not "truncate".
          DataError: there is no record, words and labels differ in number, or a label is not a label of the model.
          UnsupportedModel: the model has no usable labels; see `task.labels.names_of`.
        """
        check_split(split, self.name)
        encodings, labels = labelled_words(processor, records, length, model_config)
        return RowBatch(token_inputs(encodings, length, model_config), padded(labels, length, IGNORED))

    def sums(self, model: nn.Module, batch: RowBatch) -> Tensor:
        """Returns the sum of the losses of each example's labels, nats, (B,)."""
        return cross_entropy(model(**batch.inputs).logits, batch.labels).sum(dim=1)

    def tally(self, model: nn.Module, batch: RowBatch) -> Tally:
        """Returns loss, accuracy over all words, and the F1 of entities where the model's labels make entities.

        An entity is right where type, first word and last word are right, as seqeval counts; see `task.entities`.
        2 TP / (true + predicted) adds up over batches, since no entity goes beyond its record.
        """
        batch = batch.to(device_of(model))
        with torch.no_grad():
            logits = model(**batch.inputs).logits
        scored = batch.labels != IGNORED
        guesses = logits.argmax(dim=2)
        count = int(scored.sum())
        metrics = {"accuracy": (float((guesses == batch.labels)[scored].sum()), count)}
        if tagging := Tagging.of(names_of(model.config)):
            rows = list(zip(batch.labels, guesses, scored, strict=True))
            truths = [tagging.spans(truth[at].tolist()) for truth, _, at in rows]
            found = [tagging.spans(guess[at].tolist()) for _, guess, at in rows]
            hits = sum(len(right & given) for right, given in zip(truths, found, strict=True))
            metrics["entity_f1"] = (2.0 * hits, sum(map(len, truths)) + sum(map(len, found)))
        return Tally(float(cross_entropy(logits, batch.labels).double().sum()), count, metrics)

    def dummy_batch(self, model: nn.Module, length: int, *, seed: int) -> RowBatch:
        """Returns two random records with a random label for every token."""
        generator = torch.Generator().manual_seed(seed)
        inputs = dummy_inputs(model, length, generator)
        labels = torch.randint(len(names_of(model.config)), (2, length), generator=generator)
        return RowBatch(inputs, torch.where(inputs["attention_mask"].bool(), labels, IGNORED))
