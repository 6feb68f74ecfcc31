"""Entities and their F1 against vectors of seqeval, and which labels make entities."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from offsite.task.entities import Tagging
from offsite.task.labels import IGNORED
from offsite.task.rows import RowBatch
from offsite.task.token_classification import TokenClassification

# Random labels, so that every broken neighbourhood occurs, for example an I after an entity of another type.
VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "seqeval.json").read_text(encoding="utf-8"))["sets"]
IOBES = VECTORS["iobes"]["names"]


@pytest.mark.parametrize("kind", VECTORS)
def test_spans_are_those_of_seqeval(kind: str) -> None:
    tagging = Tagging.of(VECTORS[kind]["names"])
    assert tagging is not None
    for labels, spans in VECTORS[kind]["spans"]:
        assert tagging.spans(labels) == {tuple(span) for span in spans}


def test_other_letters_stand_for_the_same_places() -> None:
    """BILOU and BMES are IOBES with other letters; seqeval's default mode knows only the letters of IOBES."""
    dice = random.Random(4)
    for letters in ("BILU", "BMES"):
        other = ["O", *(f"{place}-{kind}" for place in letters for kind in ("PER", "LOC"))]
        mine, theirs = Tagging.of(other), Tagging.of(IOBES)
        assert mine
        assert theirs
        for _ in range(50):
            labels = [dice.randrange(len(other)) for _ in range(10)]
            assert mine.spans(labels) == theirs.spans(labels)


def test_the_outside_label_is_named_or_alone_or_there_are_no_entities() -> None:
    none = Tagging.of(["B-PER", "none", "I-PER"])
    assert none is not None
    assert none.spans([1, 0, 2, 1, 2, 1]) == {("PER", 1, 2), ("PER", 4, 4)}
    plain = Tagging.of(["O", "PER", "LOC"])  # labels without a place: adjoining words are one entity
    assert plain is not None
    assert plain.spans([1, 1, 2, 0, 2]) == {("PER", 0, 1), ("LOC", 2, 2), ("LOC", 4, 4)}
    for names in (["NOUN", "VERB"], ["LABEL_0", "LABEL_1"], ["B-PER", "I-PER", "none", "pad"], ["X", "B"]):
        assert Tagging.of(names) is None


class Scores(torch.nn.Module):
    """A model whose scores are given."""

    def __init__(self, logits: torch.Tensor, names: list[str]) -> None:
        super().__init__()
        self.logits = logits
        self.config = SimpleNamespace(id2label=dict(enumerate(names)), problem_type=None)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids[:, 0]])


@pytest.mark.parametrize("kind", VECTORS)
def test_the_f1_of_a_report_is_seqevals(kind: str) -> None:
    """In parts, whose sums add up; further tokens of a word lie between the scored tokens."""
    task, names = TokenClassification(), VECTORS[kind]["names"]
    for truth, guess, expected in VECTORS[kind]["scores"]:
        rows, words = len(truth), len(truth[0])
        labels = torch.full((rows, 2 * words), IGNORED)
        labels[:, ::2] = torch.tensor(truth)
        logits = torch.randn(rows, 2 * words, len(names), generator=torch.Generator().manual_seed(1))
        logits[:, ::2] = 9.0 * torch.nn.functional.one_hot(torch.tensor(guess), len(names)).float()
        model, batch = Scores(logits, names), RowBatch({"input_ids": torch.arange(rows)[:, None]}, labels)
        parts = [task.tally(model, batch.select(range(at, min(at + 4, rows)))) for at in range(0, rows, 4)]
        assert sum(parts[1:], parts[0]).means()["entity_f1"] == pytest.approx(expected)
        assert 0.05 < expected < 0.95


def test_words_outside_of_entities_are_no_success() -> None:
    """The report's case: 2 entity words of 20, neither found; every word but these is right."""
    names = ["none", "B-PER", "I-PER"]
    labels = torch.zeros(1, 20, dtype=torch.long)
    labels[0, 4:6] = torch.tensor([1, 2])
    logits = torch.zeros(1, 20, 3)
    logits[..., 0] = 1.0
    batch = RowBatch({"input_ids": torch.zeros(1, 1, dtype=torch.long)}, labels)
    assert TokenClassification().tally(Scores(logits, names), batch).means() == {"accuracy": 0.9, "entity_f1": 0.0}
    means = TokenClassification().tally(Scores(logits, ["NOUN", "VERB", "X"]), batch).means()
    assert set(means) == {"accuracy"}
