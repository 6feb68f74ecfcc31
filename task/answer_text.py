"""Exact match and F1 of an answer's text, as SQuAD defines them (Rajpurkar et al. 2016, and 2018 for no answer)."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized(text: str) -> list[str]:
    """Returns the words of a text in lower case, without ASCII punctuation and without English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(guess: str, truth: str) -> float:
    """Returns 1 where two answers have the same normalised words in the same order, else 0."""
    return float(normalized(guess) == normalized(truth))


def overlap_f1(guess: str, truth: str) -> float:
    """Returns the F1 of the normalised words that two answers share; without words in either, 1 for equal answers."""
    given, right = normalized(guess), normalized(truth)
    if not given or not right:
        return float(given == right)
    common = (Counter(given) & Counter(right)).total()
    return 2 * common / (len(given) + len(right))


def highest(measure: Callable[[str, str], float], guess: str, truths: Sequence[str]) -> float:
    """Returns the highest value of a measure over all right answers, as the official script of SQuAD 2.0 does.

    Right answers without a normalised word do not count; a question without right answers has the empty answer.

    Args:
      measure: `exact_match` or `overlap_f1`.
      guess: answer of a model; empty for no answer.
      truths: texts of all right answers.
    """
    counted = [truth for truth in truths if normalized(truth)] or [""]
    return max(measure(guess, truth) for truth in counted)
