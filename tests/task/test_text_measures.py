"""ROUGE, chrF and exact match against the field's own packages, and the error of a difference."""

import json
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.chrf import CHRF

from offsite.errors import ConfigError, UnknownName
from offsite.task.generation import GeneratingTask
from offsite.task.record_fields import WITHOUT_TEXT
from offsite.task.rouge import common_subsequence, rouge, words
from offsite.task.tasks import TASKS
from offsite.task.text_measures import MEASURES, check_measures, compare

# Values of the package rouge-score; its place at run time would be taken by 13 MB of nltk for a stemmer we do not use.
VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "rouge.json").read_text(encoding="utf-8"))
TEXTS = [text for part in ("default", "any script") for pair in VECTORS[part] for text in pair[:2]]


@pytest.mark.parametrize("part", ["default", "any script"])
def test_rouge_is_that_of_rouge_score(part: str) -> None:
    """English with the package's own words; other scripts with the pattern of `words` as its tokenizer."""
    for output, right, scores in VECTORS[part]:
        assert rouge(output, right) == pytest.approx(scores, abs=1e-12), (output, right)


def test_the_default_of_rouge_score_loses_other_scripts() -> None:
    """Why its own words are not taken: Greek, Russian and Chinese have none at all."""
    lost = [scores for output, right, scores in VECTORS["default on other scripts"] if output and right]
    kept = [scores for output, right, scores in VECTORS["any script"] if output and right]
    assert sum(max(scores) == 0 for scores in lost) > 5
    assert sum(max(scores) == 0 for scores in kept) < 3  # "naïve café" has other letters than "naive cafe"


def test_words_are_those_of_unicode_properties() -> None:
    """By another route: the properties of characters in the package regex."""
    for text in [*TEXTS, "é e\u0301 กั ที่ ๓ x² Ⅳ", "第3章a 々ー ｶﾞ", "\u0301a _b_ c\u200dd", "क्षि ಕ್ಷ"]:
        composed = unicodedata.normalize("NFC", text).lower()
        assert words(text) == regex.findall(VECTORS["words"], composed), text


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_the_longest_common_subsequence_is_that_of_the_usual_table(first: list[str], second: list[str]) -> None:
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, mine in enumerate(first):
        for j, its in enumerate(second):
            table[i + 1, j + 1] = table[i, j] + 1 if mine == its else max(table[i, j + 1], table[i + 1, j])
    assert common_subsequence(first, second) == table[-1, -1]


def grams(text: str, size: int) -> Counter[str]:
    letters = "".join(text.split())
    return Counter(letters[at : at + size] for at in range(len(letters) - size + 1))


def chrf_by_hand(outputs: list[str], references: list[str]) -> float:
    """Popovic 2015, with beta = 2, over the sums of a corpus; orders without any n-gram do not count."""
    rates = []
    for size in range(1, 7):
        pairs = [(grams(output, size), grams(right, size)) for output, right in zip(outputs, references, strict=True)]
        common = sum((mine & its).total() for mine, its in pairs)
        given_, right_ = sum(m.total() for m, its in pairs if its), sum(its.total() for _, its in pairs)
        if given_ and right_:
            rates.append((common / given_, common / right_))
    precision, recall = np.mean(rates, axis=0) if rates else (0.0, 0.0)
    return float(100 * 5 * precision * recall / (4 * precision + recall)) if precision + recall else 0.0


OUTPUTS = ["患者在第3天出院。", "The cat sat on the mat!", "Grüße aus Köln", "", "no no no no", "Пациент выписан."]
RIGHT = ["患者于第三天出院。", "A cat sat on a mat.", "Gruß aus Köln", "Nothing.", "no", "Пациента выписали."]


def test_chrf_is_that_of_sacrebleu_and_of_the_definition() -> None:
    values = MEASURES["chrf"].values(OUTPUTS, RIGHT)[:, 0]
    assert values[0] == pytest.approx(CHRF(char_order=6, word_order=0, beta=2).corpus_score(OUTPUTS, [RIGHT]).score)
    assert values[0] == pytest.approx(chrf_by_hand(OUTPUTS, RIGHT))
    for out, value in enumerate(values[1:]):
        rest = [[text for at, text in enumerate(texts) if at != out] for texts in (OUTPUTS, RIGHT)]
        assert value == pytest.approx(chrf_by_hand(rest[0], rest[1]))
    assert MEASURES["chrf"].values([""], ["a"]).tolist() == [[0.0]]
    assert MEASURES["chrf"].values(["a b"], ["ab"]).tolist() == [[100.0]]


def test_exact_match_is_without_case_punctuation_and_articles() -> None:
    values = MEASURES["exact_match"].values(["The  Left kidney.", "left", ""], ["left kidney", "right", "a"])
    assert values[0].tolist() == [pytest.approx(2 / 3)]  # an article alone is no word, as in SQuAD's script


def test_a_difference_has_the_error_of_paired_records() -> None:
    """Of a mean, the jackknife is the standard deviation of the differences / sqrt(n)."""
    outputs, others = [a for a, _, _ in VECTORS["default"]], [b for _, b, _ in VECTORS["default"]]
    right = others[::-1]
    found = compare(["rouge", "rouge", "exact_match", "chrf"], outputs[:40], others[:40], right[:40])
    assert list(found) == ["rouge1", "rouge2", "rougeL", "exact_match", "chrf"]
    for place, name in enumerate(("rouge1", "rouge2", "rougeL")):
        before = np.array([rouge(text, its)[place] for text, its in zip(outputs[:40], right[:40], strict=True)])
        after = np.array([rouge(text, its)[place] for text, its in zip(others[:40], right[:40], strict=True)])
        assert (found[name].before, found[name].after) == pytest.approx((before.mean(), after.mean()))
        assert found[name].error == pytest.approx(np.std(after - before, ddof=1) / np.sqrt(40))
    gaps = []
    for out in range(40):
        rest = [[text for at, text in enumerate(texts[:40]) if at != out] for texts in (outputs, others, right)]
        gaps.append(chrf_by_hand(rest[1], rest[2]) - chrf_by_hand(rest[0], rest[2]))
    assert found["chrf"].error == pytest.approx(np.sqrt(39 / 40 * np.square(np.array(gaps) - np.mean(gaps)).sum()))
    alone = compare(["rouge", "chrf"], ["a"], ["b"], ["b"])
    assert [(own.before, own.after, own.error) for own in alone.values()][::3] == [(0, 1, None), (0, 100, None)]


def test_an_accent_counts_once_however_a_file_writes_it() -> None:
    text = "Übergröße der Rötung"
    for name in ("rouge", "chrf", "exact_match"):
        for own in compare([name], ["x"], [text], [unicodedata.normalize("NFD", text)]).values():
            assert own.after in (1, 100)


def test_every_task_generates_or_says_why_not() -> None:
    assert {name for name, task in TASKS.items() if isinstance(task, GeneratingTask)} == set(TASKS) - set(WITHOUT_TEXT)
    for name in TASKS:
        check_measures((), name)
        if name in WITHOUT_TEXT:
            with pytest.raises(ConfigError, match=rf"evaluation.measures=\['rouge'\]: the task '{name}' generates no "):
                check_measures(["rouge"], name)
        else:
            check_measures(list(MEASURES), name)


def test_a_wrong_name_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match="measures='rogue' is not known; did you mean rouge"):
        check_measures(["rogue"], "seq2seq")
    monkeypatch.setitem(sys.modules, "sacrebleu", None)  # as where it is not installed
    check_measures(["rouge", "exact_match"], "seq2seq")
    with pytest.raises(ConfigError, match=r"'chrf' needs the package sacrebleu, .* pip install 'offsite\[measures\]'"):
        check_measures(["rouge", "chrf"], "seq2seq")
