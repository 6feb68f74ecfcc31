"""Extractive question answering: the place of the answer in a text."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offsite.task.answer_text import exact_match, highest, overlap_f1
from offsite.task.device import device_of
from offsite.task.encode import padded
from offsite.task.labelled import Labelled, cross_entropy, dummy_inputs, token_inputs
from offsite.task.labels import IGNORED
from offsite.task.passages import NO_ANSWER, Passage, Span, Window
from offsite.task.record_fields import ANSWERS, FIELDS
from offsite.task.records import check_split, fault, is_empty
from offsite.task.rows import RowBatch
from offsite.task.spec import Record, Tally

LONGEST_ANSWER = 30  # tokens; a longer answer is never predicted, as is usual for SQuAD
CONTEXT = "context"
NONE_AT = 0  # place of both targets where there is no answer: the first token, as [CLS] for BERT


class ExtractiveQA(Labelled):
    """The task of models with a head for the first and the last token of an answer; two targets for each example."""

    name: ClassVar[str] = "extractive_qa"
    kind: ClassVar[str] = "question_answering"
    columns: ClassVar[Mapping[str, type]] = FIELDS["extractive_qa"]

    def encode(
        self, processor: Any, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> RowBatch:
        """Returns questions with their contexts as examples: one window of each context, so one row of each record.

        The window is the one that holds the answer, so that a context may be longer than `length`. An example has no
        target where no window holds the answer. Where a context has no answer, both targets are the first token. Of
        several right answers the first is learnt that stands at its place in the context and fits a window.

        Raises:
          ConfigError: the length does not fit the model, or the split is not "truncate".
          DataError: there is no record, or no answer is at its `answer_start` of the context.
        """
        check_split(split, self.name)
        spans = [_spans(records, index) for index in range(len(records))]
        may_be_none = [NO_ANSWER] in spans  # as in SQuAD 2.0; decides on predictions alone, never on a target
        whole = processor.whole_pairs([(record["question"], record["context"]) for record in records])
        passages = [
            Passage.of(record["context"], own, encoding, length, may_be_none=may_be_none, truths=_truths(record))
            for record, own, encoding in zip(records, spans, whole, strict=True)
        ]
        inputs = token_inputs([passage.encoding_of(passage.shown) for passage in passages], length, model_config)
        labels = [_places(passage) for passage in passages]
        context = padded([passage.context_of(passage.shown) for passage in passages], length)
        sources = [passage if passage.spans else None for passage in passages]
        return RowBatch(inputs, torch.tensor(labels, dtype=torch.long), {CONTEXT: context}, sources)

    def sums(self, model: nn.Module, batch: RowBatch) -> Tensor:
        """Returns the sum of the losses of first and last token, nats, (B,); padding cannot be predicted."""
        return cross_entropy(torch.stack(_scores(model, batch.inputs), dim=1), batch.labels).sum(dim=1)

    def tally(self, model: nn.Module, batch: RowBatch) -> Tally:
        """Returns the loss, and exact match and F1 of the best answer's text, as SQuAD defines them.

        The best answer is sought in all windows of a context, also in those without the right answer, and compared with
        all right answers. Every question that could be read counts, also a question without a target.
        """
        batch = batch.to(device_of(model))
        with torch.no_grad():
            scores = _scores(model, batch.inputs)
            loss = float(cross_entropy(torch.stack(scores, dim=1), batch.labels).double().sum())
            guesses = _guesses(model, batch, scores)
        truths = [passage.truths for passage in batch.sources if passage is not None]
        pairs = [(guess, right) for guess, right in zip(guesses, truths, strict=True) if guess is not None]
        metrics = {
            name: (sum(highest(measure, guess, right) for guess, right in pairs), len(truths))
            for name, measure in (("exact_match", exact_match), ("f1", overlap_f1))
        }
        return Tally(loss, int(batch.targets.sum()), metrics)

    def dummy_batch(self, model: nn.Module, length: int, *, seed: int) -> RowBatch:
        """Returns two random records; the second half of each is its context."""
        generator = torch.Generator().manual_seed(seed)
        inputs = dummy_inputs(model, length, generator)
        widths = inputs["attention_mask"].sum(dim=1)
        context = inputs["attention_mask"] * (torch.arange(length)[None, :] >= (widths // 2)[:, None])
        first = widths - 1 - (widths // 4) * torch.randint(2, (2,), generator=generator)
        return RowBatch(inputs, torch.stack([first, widths - 1], dim=1), {CONTEXT: context})


def _answers_of(record: Record) -> list[tuple[str, int]]:
    """Returns the text and the place of each right answer of a record."""
    several = record.get(ANSWERS) or [{"text": record["answer"], "answer_start": record["answer_start"]}]
    return [(one["text"], one["answer_start"]) for one in several]


def _truths(record: Record) -> list[str]:
    return [text.strip() for text, _ in _answers_of(record)]


def _spans(records: Sequence[Record], index: int) -> list[Span]:
    """Returns the first character and the end of each right answer in its context, without spaces around the answer.

    `NO_ANSWER` alone stands for an empty answer at -1. Nothing is returned for an empty record, and for one of whose
    answers none stands at its place, in `LenientRecords`.
    """
    record = records[index]
    if is_empty(record):
        return []
    answers = _answers_of(record)
    if set(answers) == {("", -1)}:
        return [NO_ANSWER]
    spans = [_span(answer, start, record["context"]) for answer, start in answers]
    if not any(spans):
        fault(
            records,
            index,
            "answer",
            "must stand in the context at answer_start, counted in characters, or be empty at -1 where the context has "
            "no answer; correct it",
        )
    return [span for span in spans if span is not None]


def _span(answer: str, start: int, context: str) -> Span | None:
    """Returns the characters of an answer in its context; None where the answer does not stand at its place."""
    text = answer.strip()
    led = start + len(answer) - len(answer.lstrip())
    # An answer with a space in front may be placed at its space, as in some files of SQuAD, or at its first word.
    for spelling, place, begin in ((answer, start, led), (text, start, start)):
        if text and place >= 0 and context[place : place + len(spelling)] == spelling:
            return begin, begin + len(text)
    return None


def _places(passage: Passage) -> list[int]:
    """Returns the first and the last token of the answer in the shown window; `IGNORED` twice without a target."""
    if passage.span is None or passage.shown is None:
        return [IGNORED, IGNORED]
    if passage.span == NO_ANSWER:
        return [NONE_AT, NONE_AT]
    first, last = passage.tokens or (-1, -1)
    if first < passage.shown[0] or last >= passage.shown[1]:
        return [IGNORED, IGNORED]
    before = passage.first - passage.shown[0]
    return [first + before, last + before]


def _guesses(model: nn.Module, batch: RowBatch, scores: tuple[Tensor, Tensor]) -> list[str | None]:
    """Returns the text of the best answer to each question of a batch; None where no window fits.

    Args:
      model: the model.
      batch: questions with their shown windows.
      scores: scores of each place in the shown windows.
    """
    best = {row: _Best() for row, passage in enumerate(batch.sources) if passage is not None}
    shown = [(row, batch.sources[row].shown) for row in best]
    kept = [(row, window) for row, window in shown if window in batch.sources[row].windows()]
    rows = [row for row, _ in kept]
    _note(best, batch, kept, scores[0][rows], scores[1][rows])
    others = [(row, window) for row in best for window in batch.sources[row].windows() if (row, window) not in kept]
    length, config, device = batch.inputs["input_ids"].shape[1], model.config, batch.labels.device
    for at in range(0, len(others), len(batch)):
        part = others[at : at + len(batch)]
        inputs = token_inputs([batch.sources[row].encoding_of(window) for row, window in part], length, config)
        first, last = _scores(model, {name: tensor.to(device) for name, tensor in inputs.items()})
        _note(best, batch, part, first, last)
    return [one.answer for one in best.values()]


class _Best:
    """The best answer to one question so far."""

    def __init__(self) -> None:
        self.text: str | None = None
        self._score, self._none = -float("inf"), float("inf")
        self._may_be_none = False

    def note(self, text: str, score: float, none: float, *, may_be_none: bool) -> None:
        """Notes the best answer of a window, and the window's score of no answer."""
        if self.text is None or score > self._score:
            self.text, self._score = text, score
        self._none, self._may_be_none = min(self._none, none), may_be_none

    @property
    def answer(self) -> str | None:
        """The answer; empty where no answer has a higher score in every window, as for SQuAD 2.0."""
        return "" if self._may_be_none and self._none > self._score else self.text


def _note(
    best: Mapping[int, _Best], batch: RowBatch, windows: Sequence[tuple[int, Window]], first: Tensor, last: Tensor
) -> None:
    """Notes the best answer of each window, from the scores of its places, (windows, T) each."""
    if not windows:
        return
    passages = [batch.sources[row] for row, _ in windows]
    marks = [passage.context_of(window) for passage, (_, window) in zip(passages, windows, strict=True)]
    context = padded(marks, first.shape[1]).to(first.device)
    places, totals = _best(first, last, context)
    nones = (first[:, NONE_AT] + last[:, NONE_AT]).float()
    for at, (passage, (row, window)) in enumerate(zip(passages, windows, strict=True)):
        shift = window[0] - passage.first
        begin, end = (int(place) + shift for place in places[at])
        text = passage.words(begin, end)
        best[row].note(text, float(totals[at]), float(nones[at]), may_be_none=passage.may_be_none)


def _scores(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the scores of each place as first and as last token, (B, T) each; padding has the lowest number."""
    output = model(**inputs)
    padding = inputs["attention_mask"] == 0
    first, last = (
        scores.masked_fill(padding, torch.finfo(scores.dtype).min)
        for scores in (output.start_logits, output.end_logits)
    )
    return first, last


def _best(first: Tensor, last: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the best first and last token in the context, in this order and near enough, and the sum of their scores.

    The tokens are int64 (B, 2), the sums float32 (B,).
    """
    length = first.shape[1]
    steps = torch.arange(length, device=first.device)
    apart = steps[None, :] - steps[:, None]
    allowed = (apart >= 0) & (apart < LONGEST_ANSWER) & context[:, :, None].bool() & context[:, None, :].bool()
    total = (first[:, :, None] + last[:, None, :]).float().masked_fill(~allowed, -torch.inf)
    sums, place = total.reshape(len(first), -1).max(dim=1)
    return torch.stack([place // length, place % length], dim=1), sums
