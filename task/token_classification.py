"""Token classification: one label for each word, for example for named entities."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offsite.task.encode import padded
from offsite.task.entities import Tagging
from offsite.task.labelled import Labelled, cross_entropy, dummy_inputs, token_inputs
from offsite.task.labels import IGNORED, Labels, names_of
from offsite.task.record_fields import FIELDS
from offsite.task.records import check_split, fault
from offsite.task.rows import RowBatch
from offsite.task.spec import Record, Tally
from offsite.task.tokenizer import Encoding


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
        words = [_words(records, index) for index in range(len(records))]
        labels = Labels(model_config).lists_of(records, "labels")
        encodings = processor.worded(words, length)
        inputs = token_inputs(encodings, length, model_config)
        rows = [_at_first_tokens(encoding, own) for encoding, own in zip(encodings, labels, strict=True)]
        return RowBatch(inputs, padded(rows, length, IGNORED))

    def sums(self, model: nn.Module, batch: RowBatch) -> Tensor:
        """Returns the sum of the losses of each example's labels, nats, (B,)."""
        return cross_entropy(model(**batch.inputs).logits, batch.labels).sum(dim=1)

    def tally(self, model: nn.Module, batch: RowBatch) -> Tally:
        """Returns loss, accuracy over all words, and the F1 of entities where the model's labels make entities.

        An entity is right where type, first word and last word are right, as seqeval counts; see `task.entities`.
        2 TP / (true + predicted) adds up over batches, since no entity goes beyond its record.
        """
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


def _words(records: Sequence[Record], index: int) -> list[str]:
    """Returns a record's words; an empty list for a faulty record in `LenientRecords`."""
    words, labels = records[index]["words"], records[index]["labels"]
    if not all(isinstance(word, str) for word in words):
        fault(records, index, "words", "must be a list of texts; correct the field")
        return []
    if len(words) != len(labels):
        fault(records, index, "labels", "must be as many as the words; correct the field")
        return []
    return list(words)


def _at_first_tokens(encoding: Encoding, labels: Sequence[int]) -> list[int]:
    """Returns the label of each token: the word's label at its first token, else `IGNORED`."""
    row, seen = [], set[int]()
    for word in encoding.words:
        first = 0 <= word < len(labels) and word not in seen
        row.append(labels[word] if first else IGNORED)
        seen.add(word)
    return row
