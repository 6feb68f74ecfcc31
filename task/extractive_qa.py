"""Extractive question answering: the place of the answer in a text."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offsite.task.encode import padded
from offsite.task.labelled import Labelled, cross_entropy, dummy_inputs, token_inputs
from offsite.task.labels import IGNORED
from offsite.task.record_fields import FIELDS
from offsite.task.records import check_split, fault
from offsite.task.rows import RowBatch
from offsite.task.spec import Record, Tally
from offsite.task.tokenizer import Encoding

LONGEST_ANSWER = 30  # tokens; a longer answer is never predicted, as is usual for SQuAD
CONTEXT = "context"


class ExtractiveQA(Labelled):
    """The task of models with a head for the first and the last token of an answer; two targets for each example."""

    name: ClassVar[str] = "extractive_qa"
    kind: ClassVar[str] = "question_answering"
    columns: ClassVar[Mapping[str, type]] = FIELDS["extractive_qa"]

    def encode(
        self, processor: Any, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> RowBatch:
        """Returns questions with their contexts as examples; an example whose answer was cut off has no target.

        Raises:
          ConfigError: the length does not fit the model, or the split is not "truncate".
          DataError: there is no record, or an answer is not at `answer_start` of its context.
        """
        check_split(split, self.name)
        spans = [_span(records, index) for index in range(len(records))]
        encodings = processor.pairs([(record["question"], record["context"]) for record in records], length)
        inputs = token_inputs(encodings, length, model_config)
        labels = [_tokens_of(encoding, span) for encoding, span in zip(encodings, spans, strict=True)]
        context = padded([[int(which == 1) for which in encoding.sequences] for encoding in encodings], length)
        return RowBatch(inputs, torch.tensor(labels, dtype=torch.long), {CONTEXT: context})

    def sums(self, model: nn.Module, batch: RowBatch) -> Tensor:
        """Returns the sum of the losses of first and last token, nats, (B,); padding cannot be predicted."""
        return cross_entropy(torch.stack(_scores(model, batch), dim=1), batch.labels).sum(dim=1)

    def tally(self, model: nn.Module, batch: RowBatch) -> Tally:
        """Returns the loss, and exact match and F1 of the best answer in the context against the right answer.

        Exact match and F1 are those of SQuAD (Rajpurkar et al. 2016), with token positions in the place of normalised
        words.
        """
        with torch.no_grad():
            scores = _scores(model, batch)
        loss = cross_entropy(torch.stack(scores, dim=1), batch.labels)
        scored = batch.labels[:, 0] != IGNORED
        guess = _best(*scores, batch.aside[CONTEXT])[scored]
        truth = batch.labels[scored]
        overlap = torch.minimum(guess[:, 1], truth[:, 1]) - torch.maximum(guess[:, 0], truth[:, 0]) + 1
        sizes = (guess[:, 1] - guess[:, 0] + 1) + (truth[:, 1] - truth[:, 0] + 1)
        count = len(truth)
        metrics = {
            "exact_match": (float((guess == truth).all(dim=1).sum()), count),
            "f1": (float((2 * overlap.clamp(min=0) / sizes).double().sum()), count),
        }
        return Tally(float(loss.double().sum()), int(batch.targets.sum()), metrics)

    def dummy_batch(self, model: nn.Module, length: int, *, seed: int) -> RowBatch:
        """Returns two random records; the second half of each is its context."""
        generator = torch.Generator().manual_seed(seed)
        inputs = dummy_inputs(model, length, generator)
        widths = inputs["attention_mask"].sum(dim=1)
        context = inputs["attention_mask"] * (torch.arange(length)[None, :] >= (widths // 2)[:, None])
        first = widths - 1 - (widths // 4) * torch.randint(2, (2,), generator=generator)
        return RowBatch(inputs, torch.stack([first, widths - 1], dim=1), {CONTEXT: context})


def _span(records: Sequence[Record], index: int) -> tuple[int, int]:
    """Returns the first character of an answer in its context and the end; 0, 0 if it is wrong in `LenientRecords`."""
    record = records[index]
    answer, start = record["answer"], record["answer_start"]
    if not answer or start < 0 or record["context"][start : start + len(answer)] != answer:
        fault(records, index, "answer", "must stand in the context at answer_start, counted in characters; correct it")
        return 0, 0
    return start, start + len(answer)


def _tokens_of(encoding: Encoding, span: tuple[int, int]) -> list[int]:
    """Returns the first and the last token of a span of the context; `IGNORED` twice where a part was cut off."""
    inside = [
        number
        for number, (which, start, end) in enumerate(
            zip(encoding.sequences, encoding.starts, encoding.ends, strict=True)
        )
        if which == 1 and start < span[1] and end > span[0]
    ]
    if not inside or encoding.starts[inside[0]] > span[0] or encoding.ends[inside[-1]] < span[1]:
        return [IGNORED, IGNORED]
    return [inside[0], inside[-1]]


def _scores(model: nn.Module, batch: RowBatch) -> tuple[Tensor, Tensor]:
    """Returns the scores of each place as first and as last token, (B, T) each; padding has the lowest number."""
    output = model(**batch.inputs)
    padding = batch.inputs["attention_mask"] == 0
    first, last = (
        scores.masked_fill(padding, torch.finfo(scores.dtype).min)
        for scores in (output.start_logits, output.end_logits)
    )
    return first, last


def _best(first: Tensor, last: Tensor, context: Tensor) -> Tensor:
    """Returns the best first and last token in the context, in this order and near enough, int64 (B, 2)."""
    length = first.shape[1]
    steps = torch.arange(length, device=first.device)
    apart = steps[None, :] - steps[:, None]
    allowed = (apart >= 0) & (apart < LONGEST_ANSWER) & context[:, :, None].bool() & context[:, None, :].bool()
    total = (first[:, :, None] + last[:, None, :]).float().masked_fill(~allowed, -torch.inf)
    place = total.reshape(len(first), -1).argmax(dim=1)
    return torch.stack([place // length, place % length], dim=1)
