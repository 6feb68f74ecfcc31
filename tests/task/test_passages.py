"""Answers in contexts: windows against transformers', exact match and F1 against a second reading of SQuAD's script."""

import collections
import random
import re
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from offsite.errors import DataError
from offsite.task.answer_text import exact_match, highest, overlap_f1
from offsite.task.extractive_qa import LONGEST_ANSWER, ExtractiveQA
from offsite.task.labels import IGNORED
from offsite.task.passages import NO_ANSWER, OVERLAP, Passage
from offsite.task.records import LenientRecords, Row, without_empty
from offsite.task.tokenizer import Encoding
from tests.task_samples import WORDS, first_of


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExtractiveQA, Any, Any, Path]:
    folder = first_of("extractive_qa").save(tmp_path_factory.mktemp("model"))
    task = ExtractiveQA()
    return task, task.load(folder, dtype=torch.float32), task.load_processor(folder), folder


def encoded(reader: Any, records: Any, length: int = 20) -> Any:
    task, model, processor, _ = reader
    return task.encode(processor, records, length=length, split="truncate", model_config=model.config)


def question(dice: random.Random, words: int) -> dict[str, Any]:
    """A question whose answer of one to three words stands anywhere in its context."""
    context = [dice.choice(WORDS) for _ in range(words)]
    first = dice.randrange(words)
    last = min(first + dice.randrange(3), words - 1)
    start = len(" ".join([*context[:first], ""]))
    answer = " ".join(context[first : last + 1])
    return {
        "question": f"w1 w{dice.randrange(60)}",
        "context": " ".join(context),
        "answer": answer,
        "answer_start": start,
    }


# windows


def test_windows_are_those_of_transformers(reader: Any) -> None:
    """Compared with `return_overflowing_tokens` and a stride: ids, segments and offsets of every window."""
    *_, folder = reader
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    dice = random.Random(1)
    for words in (1, 3, 14, 15, 16, 40, 90):
        record = question(dice, words)
        passage = encoded(reader, [record]).sources[0]
        stride = min(OVERLAP, passage.room // 2)
        expected = theirs(
            record["question"],
            record["context"],
            truncation="only_second",
            max_length=20,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        windows = [passage.encoding_of(window) for window in passage.windows()]
        assert [window.ids for window in windows] == expected["input_ids"]
        assert [window.types for window in windows] == expected["token_type_ids"]
        assert [list(zip(window.starts, window.ends, strict=True)) for window in windows] == expected["offset_mapping"]
        marks = [passage.context_of(window) for window in passage.windows()]
        inside = [[int(which == 1) for which in expected.sequence_ids(at)] for at in range(len(windows))]
        assert [mark + [0] * (len(row) - len(mark)) for mark, row in zip(marks, inside, strict=True)] == inside


def test_every_answer_of_a_long_context_is_learnt_in_one_row_of_its_record(reader: Any) -> None:
    """The text between the two targets is the answer, and what the row holds follows from its record alone."""
    dice = random.Random(2)
    records = [question(dice, dice.choice([2, 15, 16, 60, 150])) for _ in range(24)]
    batch = encoded(reader, records)
    assert len(batch) == 24
    assert batch.targets.tolist() == [2] * 24
    vocabulary = {number: word for word, number in _vocabulary(reader).items()}
    for row, record in enumerate(records):
        first, last = batch.labels[row].tolist()
        assert (
            " ".join(vocabulary[at] for at in batch.inputs["input_ids"][row, first : last + 1].tolist())
            == record["answer"]
        )
    for row in (0, 7, 23):
        alone = encoded(reader, [records[row]])
        for name in batch.inputs:
            assert torch.equal(alone.inputs[name][0], batch.inputs[name][row])
        assert torch.equal(alone.labels[0], batch.labels[row])


def _vocabulary(reader: Any) -> dict[str, int]:
    return PreTrainedTokenizerFast.from_pretrained(reader[3]).get_vocab()


def test_the_shown_window_has_the_most_context_around_the_answer() -> None:
    """By brute force over all windows; an answer longer than the overlap has a window that begins with it."""
    for size in (30, 45, 100):
        for first in range(size):
            for long in (1, 2, 9):
                span = (first, min(first + long, size))
                passage = _letters(size, span, length=20)
                tokens = (span[0] + 3, span[1] + 2)
                holding = [w for w in passage.windows() if w[0] <= tokens[0] and tokens[1] < w[1]]
                best = max((min(tokens[0] - w[0], w[1] - 1 - tokens[1]) for w in holding), default=None)
                shown = passage.shown
                assert shown is not None
                assert shown[0] <= tokens[0]
                assert tokens[1] < shown[1] <= size + 3
                if best is None:
                    assert shown[0] == tokens[0]
                else:
                    assert shown in holding
                    assert min(tokens[0] - shown[0], shown[1] - 1 - tokens[1]) == best
    too_long = _letters(100, (10, 60), length=20)
    assert too_long.shown == too_long.windows()[0]
    assert _letters(100, (10, 12), length=4).shown is None  # the question alone fills the window


def _letters(size: int, *spans: tuple[int, int], length: int) -> Passage:
    """One token for each character; three tokens before the context and one behind."""
    places = [0, 0, 0, *range(size), 0]
    sequences = [-1, 0, -1, *[1] * size, -1]
    ends = [place + int(which == 1) for place, which in zip(places, sequences, strict=True)]
    ids = list(range(size + 4))
    return Passage.of("x" * size, spans, Encoding(ids, ids, sequences, ids, places, ends), length, may_be_none=False)


# what an answer may be


@pytest.mark.parametrize(
    ("answer", "start"),
    [("w2 w3", 3), (" w2 w3", 2), (" w2 w3", 3), ("w2 w3 ", 3), ("w2 w3\n", 3), ("\tw2 w3 ", 3)],
)
def test_spaces_around_an_answer_are_no_part_of_it(reader: Any, answer: str, start: int) -> None:
    record = {"question": "w9", "context": "w1 w2 w3 w4", "answer": answer, "answer_start": start}
    batch = encoded(reader, [record])
    assert batch.labels.tolist() == [[4, 5]]
    assert batch.sources[0].truths == ("w2 w3",)


@pytest.mark.parametrize(("answer", "start"), [("", 0), ("", 3), ("  ", 2), ("w3", -1), ("w2", 4), ("w2 w3 w9", 3)])
def test_an_answer_that_is_not_there_is_refused_and_never_shown(reader: Any, answer: str, start: int) -> None:
    record = {"question": "w9", "context": "w1 w2 w3 w4", "answer": answer, "answer_start": start}
    with pytest.raises(DataError, match=r"^line=7 field='answer': must stand in the context .* empty at -1"):
        encoded(reader, [Row(record, "line=7")])
    lenient = LenientRecords([Row(record, "line=7")])
    batch = encoded(reader, lenient)
    assert (batch.targets.tolist(), batch.sources, len(lenient.faults)) == ([0], [None], 1)


def test_a_question_without_an_answer_is_learnt_at_the_first_token(reader: Any) -> None:
    """As SQuAD 2.0 is learnt: both targets at [CLS]; an empty record beside it still teaches nothing."""
    none = {"question": "w9", "context": " ".join(WORDS), "answer": "", "answer_start": -1}
    empty = Row({"question": "", "context": "", "answer": "", "answer_start": -1}, "line=2", empty=True)
    records = [none, empty]
    batch = without_empty(encoded(reader, records), records, "truncate")
    assert batch.labels.tolist() == [[0, 0], [IGNORED, IGNORED]]
    assert batch.sources[0].span == NO_ANSWER
    assert batch.sources[1] is None


# several right answers


def answered(context: str, *answers: tuple[str, int]) -> dict[str, Any]:
    """A question with its right answers in order, as the readers give them."""
    listed = [{"text": text, "answer_start": start} for text, start in answers]
    first = listed[0] if listed else {"text": "", "answer_start": -1}
    record = {"question": "w9", "context": context, "answer": first["text"], "answer_start": first["answer_start"]}
    return record | ({"answers": listed} if len(listed) > 1 else {})


def test_the_first_right_answer_that_stands_there_and_fits_a_window_is_learnt(reader: Any) -> None:
    context = "w1 w2 w3 w4"
    for answers, labels in (
        ([("w2", 3), ("w2 w3", 3)], [4, 4]),
        ([("w2 w3", 3), ("w2", 3)], [4, 5]),
        ([("w9", 3), ("w3", 6)], [5, 5]),  # an alias, which stands nowhere
        ([("", -1), ("w3", 6)], [5, 5]),
    ):
        assert encoded(reader, [answered(context, *answers)]).labels.tolist() == [labels], answers
    long = " ".join(WORDS)  # no window of 20 tokens holds the whole context
    record = answered(long, (long, 0), ("w1 w2", long.index("w1 w2")))
    batch = encoded(reader, [record])
    assert batch.targets.tolist() == [2]
    (passage,) = batch.sources
    assert long[passage.span[0] : passage.span[1]] == "w1 w2"
    assert passage.truths == (long, "w1 w2")
    with pytest.raises(DataError, match="must stand in the context at answer_start"):
        encoded(reader, [answered(context, ("w2", 4), ("w3", 5))])


def test_of_several_answers_that_fit_the_first_is_shown() -> None:
    assert _letters(30, (10, 28), (3, 5), length=20).span == (3, 5)  # 16 letters of context fit a window
    assert _letters(30, (10, 12), (3, 5), length=20).span == (10, 12)
    assert _letters(30, (0, 28), (1, 30), length=20).span == (0, 28)


# exact match and F1


def squad(guess: str, truth: str) -> tuple[float, float]:
    """The official script's rules, written again: normalise, compare, and count common words."""

    def words(text: str) -> list[str]:
        text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    given, right = words(guess), words(truth)
    exact = float(" ".join(given) == " ".join(right))
    if not given or not right:
        return exact, float(given == right)
    left = collections.Counter(right)
    same = 0
    for word in given:
        same += left[word] > 0
        left[word] -= 1
    if not same:
        return exact, 0.0
    precision, recall = same / len(given), same / len(right)
    return exact, 2 * precision * recall / (precision + recall)


def test_texts_are_compared_as_squad_compares_them() -> None:
    assert exact_match("The  Eiffel-Tower!", "eiffeltower") == 1.0
    assert overlap_f1("an apple a day", "apple day keeps") == pytest.approx(0.8)
    assert (overlap_f1("", ""), overlap_f1("the", "."), overlap_f1("", "x"), exact_match("", "")) == (
        1.0,
        1.0,
        0.0,
        1.0,
    )
    dice = random.Random(5)
    pieces = ["the", "The", "a", "an", "cat", "Cat,", "dog", "dog.", "-", "", "theatre", "über", "42", "(42)"]
    for _ in range(600):
        guess, truth = (" ".join(dice.choice(pieces) for _ in range(dice.randrange(6))) for _ in range(2))
        assert (exact_match(guess, truth), overlap_f1(guess, truth)) == pytest.approx(squad(guess, truth))


def official(guess: str, answers: list[str]) -> tuple[float, float]:
    """The official script of SQuAD 2.0: the best over the answers that keep a word, and "" where none does."""
    gold = [answer for answer in answers if squad(answer, "") == (0.0, 0.0)] or [""]
    return max(squad(guess, one)[0] for one in gold), max(squad(guess, one)[1] for one in gold)


def test_of_several_right_answers_the_best_counts_as_in_squads_script() -> None:
    assert [highest(exact_match, "cat", truths) for truths in (["dog", "The cat."], ["dog"], [])] == [1.0, 0.0, 0.0]
    assert [highest(exact_match, "", truths) for truths in (["the", "cat"], ["the"], [], [""])] == [0.0, 1.0, 1.0, 1.0]
    assert highest(overlap_f1, "a big cat", ["dog", "cat", "big black cat"]) == pytest.approx(0.8)
    dice = random.Random(9)
    pieces = ["the", "A", "cat", "Cat,", "dog", "-", "", "42"]

    def text() -> str:
        return " ".join(dice.choice(pieces) for _ in range(dice.randrange(4)))

    for _ in range(600):
        guess, truths = text(), [text() for _ in range(dice.randrange(6))]
        found = highest(exact_match, guess, truths), highest(overlap_f1, guess, truths)
        assert found == pytest.approx(official(guess, truths)), (guess, truths)


def by_search(reader: Any, record: dict[str, Any], passage: Passage) -> tuple[float, str, float]:
    """Returns the best score, its text, and the lowest score of no answer, one window and one place at a time."""
    _, model, *_ = reader
    best, none = (-float("inf"), ""), float("inf")
    for window in passage.windows():
        encoding = passage.encoding_of(window)
        inputs = {"input_ids": torch.tensor([encoding.ids]), "token_type_ids": torch.tensor([encoding.types])}
        with torch.no_grad():
            output = model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
        first, last = output.start_logits[0], output.end_logits[0]
        places = [at for at, which in enumerate(encoding.sequences) if which == 1]
        none = min(none, float(first[0] + last[0]))
        for i in places:
            for j in places:
                if i <= j < i + LONGEST_ANSWER:
                    text = record["context"][encoding.starts[i] : encoding.ends[j]]
                    best = max(best, (float(first[i] + last[j]), text), key=lambda pair: pair[0])
    return *best, none


@pytest.mark.parametrize("unanswerable", [False, True])
def test_the_measures_are_those_of_a_search_over_all_windows(reader: Any, unanswerable: bool) -> None:
    """Long contexts beside short ones, several right answers, and in parts; no window has an advantage."""
    task, model, *_ = reader
    dice = random.Random(6)
    records = [question(dice, dice.choice([3, 9, 30, 50])) for _ in range(10)]
    for record in records[::2]:
        words = [word for word in record["context"].split() if record["context"].count(word) == 1]
        others = [(word, record["context"].index(word)) for word in words]
        record.update(answered(record["context"], (record["answer"], record["answer_start"]), *others))
    if unanswerable:
        records += [answered(record["context"]) | {"question": record["question"]} for record in records[:4]]
    batch = encoded(reader, records)
    searched = [by_search(reader, record, passage) for record, passage in zip(records, batch.sources, strict=True)]
    guesses = ["" if unanswerable and none > score else text for score, text, none in searched]
    right = [[one["text"] for one in record.get("answers", [])] or [record["answer"]] for record in records]
    pairs = [official(guess, truths) for guess, truths in zip(guesses, right, strict=True)]
    parts = [task.tally(model, batch.select(range(at, min(at + 3, len(batch))))) for at in range(0, len(batch), 3)]
    means = sum(parts[1:], parts[0]).means()
    assert means["exact_match"] == pytest.approx(sum(exact for exact, _ in pairs) / len(pairs))
    assert means["f1"] == pytest.approx(sum(f1 for _, f1 in pairs) / len(pairs))


def test_a_question_without_a_target_still_counts_in_the_measures(reader: Any) -> None:
    """The answer is longer than a window, or the question leaves no room; an unreadable record is no question."""
    task, model, *_ = reader
    context = " ".join(WORDS)
    long = {"question": "w1", "context": context, "answer": context, "answer_start": 0}
    crowded = question(random.Random(7), 5) | {"question": context}
    good = question(random.Random(8), 5)
    records = LenientRecords([long, crowded, good, good | {"answer": "x"}])
    batch = encoded(reader, records)
    assert batch.targets.tolist() == [0, 0, 2, 0]
    tally = task.tally(model, batch)
    assert tally.targets == 2
    assert tally.metrics["exact_match"][1] == tally.metrics["f1"][1] == 3
    emptied = batch.emptied([2])
    assert task.tally(model, emptied).metrics["exact_match"][1] == 2


def test_a_word_of_several_tokens_and_dropped_letters_keep_their_target() -> None:
    """An answer begins inside of a token, or with letters that the tokenizer drops."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, "ab": 1, "cd": 2}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(".", "removed"), pre_tokenizers.WhitespaceSplit()]
    )
    pair = made.encode("ab", ".ab cd.")
    encoding = Encoding(pair.ids, pair.type_ids, [0, 1, 1], [0, 0, 1], *map(list, zip(*pair.offsets, strict=True)))
    for span, tokens in (((0, 3), (1, 1)), ((2, 3), (1, 1)), ((1, 7), (1, 2)), ((6, 7), None)):
        assert Passage.of(".ab cd.", [span], encoding, 8, may_be_none=False).tokens == tokens


def test_the_scores_of_a_batch_without_texts_are_its_loss(reader: Any) -> None:
    task, model, *_ = reader
    tally = task.tally(model, task.dummy_batch(model, 12, seed=1))
    assert tally.targets == 4
    assert tally.means() == {}
