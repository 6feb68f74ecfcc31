"""Extractive question answering: where in a text the answer stands."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offsite.task.encode import padded
from offsite.task.labelled import Labelled, cross_entropy, invented_inputs, token_inputs
from offsite.task.labels import IGNORED
from offsite.task.records import check_split, fault
from offsite.task.rows import RowBatch
from offsite.task.spec import Record, Tally
from offsite.task.tokenizer import Encoding

LONGEST_ANSWER = 30  # tokens; a longer one is never told, as is usual for SQuAD
CONTEXT = "context"


class ExtractiveQA(Labelled):
    """The task of models with a head for the first and last token of an answer; two targets per example."""

    name: ClassVar[str] = "extractive_qa"
    kind: ClassVar[str] = "question_answering"
    columns: ClassVar[Mapping[str, type]] = {"question": str, "context": str, "answer": str, "answer_start": int}

    def encode(
        self, processor: Any, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> RowBatch:
        """Returns questions with their contexts as examples; one whose answer was cut off has no target.

        Raises:
          ConfigError: the length does not fit the model, or the split is not "truncate".
          DataError: there is no record, or an answer does not stand in its context where it is said to.
        """
        check_split(split, self.name)
        spans = [_span(records, index) for index in range(len(records))]
        found = processor.pairs([(record["question"], record["context"]) for record in records], length)
        inputs = token_inputs(found, length, model_config)
        labels = [_tokens_of(one, span) for one, span in zip(found, spans, strict=True)]
        context = padded([[int(which == 1) for which in one.sequences] for one in found], length)
        return RowBatch(inputs, torch.tensor(labels, dtype=torch.long), {CONTEXT: context})

    def sums(self, model: nn.Module, batch: RowBatch) -> Tensor:
        """Returns the sum of the losses of first and last token, nats, (B,); padding is no choice."""
        return cross_entropy(torch.stack(_scores(model, batch), dim=1), batch.labels).sum(dim=1)

    def tally(self, model: nn.Module, batch: RowBatch) -> Tally:
        """Returns loss, exact match and F1 of the best answer in the context against the right one, by their tokens.

        Exact match and F1 as for SQuAD (Rajpurkar et al. 2016), of token positions in the place of normalised words.
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

    def invented(self, model: nn.Module, length: int, *, seed: int) -> RowBatch:
        """Returns two records that nobody wrote, the second half of each its context."""
        generator = torch.Generator().manual_seed(seed)
        inputs = invented_inputs(model, length, generator)
        widths = inputs["attention_mask"].sum(dim=1)
        context = inputs["attention_mask"] * (torch.arange(length)[None, :] >= (widths // 2)[:, None])
        first = widths - 1 - (widths // 4) * torch.randint(2, (2,), generator=generator)
        return RowBatch(inputs, torch.stack([first, widths - 1], dim=1), {CONTEXT: context})


def _span(records: Sequence[Record], index: int) -> tuple[int, int]:
    """Returns the characters of an answer in its context, from and to; none where it is wrong and that is forgiven."""
    record = records[index]
    answer, start = record["answer"], record["answer_start"]
    if not answer or start < 0 or record["context"][start : start + len(answer)] != answer:
        fault(records, index, "answer", "must stand in the context at answer_start, counted in characters")
        return 0, 0
    return start, start + len(answer)


def _tokens_of(found: Encoding, span: tuple[int, int]) -> list[int]:
    """Returns the first and the last token of a span of the context, `IGNORED` where not all of it is there."""
    inside = [
        number
        for number, (which, start, end) in enumerate(zip(found.sequences, found.starts, found.ends, strict=True))
        if which == 1 and start < span[1] and end > span[0]
    ]
    if not inside or found.starts[inside[0]] > span[0] or found.ends[inside[-1]] < span[1]:
        return [IGNORED, IGNORED]
    return [inside[0], inside[-1]]


def _scores(model: nn.Module, batch: RowBatch) -> tuple[Tensor, Tensor]:
    """Returns the scores of each place as first and as last token, (B, T) each; the least number on padding."""
    output = model(**batch.inputs)
    padding = batch.inputs["attention_mask"] == 0
    first, last = (
        scores.masked_fill(padding, torch.finfo(scores.dtype).min)
        for scores in (output.start_logits, output.end_logits)
    )
    return first, last


def _best(first: Tensor, last: Tensor, context: Tensor) -> Tensor:
    """Returns the best first and last token within the context, in this order and not too far apart, int64 (B, 2)."""
    length = first.shape[1]
    steps = torch.arange(length, device=first.device)
    apart = steps[None, :] - steps[:, None]
    allowed = (apart >= 0) & (apart < LONGEST_ANSWER) & context[:, :, None].bool() & context[:, None, :].bool()
    total = (first[:, :, None] + last[:, None, :]).float().masked_fill(~allowed, -torch.inf)
    place = total.reshape(len(first), -1).argmax(dim=1)
    return torch.stack([place // length, place % length], dim=1)
