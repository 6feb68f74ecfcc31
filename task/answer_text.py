"""Exact match and F1 of an answer's text, as SQuAD defines them (Rajpurkar et al. 2016, and 2018 for no answer)."""

import re
import string
from collections import Counter

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
