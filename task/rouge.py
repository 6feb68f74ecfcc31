"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) as the package rouge-score defines them, over words of any script."""

import itertools
import unicodedata
from collections import Counter
from collections.abc import Sequence

NAMES = ("rouge1", "rouge2", "rougeL")
# Beginnings of the Unicode names of letters whose scripts put no space between words: each letter is a word.
_UNSPACED = ("CJK ", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "IDEOGRAPHIC", "THAI ", "LAO ", "KHMER ", "MYANMAR ")


def words(text: str) -> list[str]:
    """Returns the words of a text: runs of letters and digits in lower case, each with its combining marks.

    Of ASCII text these are the words of rouge-score. Its own default drops every other letter, so "Übergröße" would be
    "bergr" and "e", and Greek would be nothing.
    """
    pieces, inside, grows = list[str](), False, False
    for char in unicodedata.normalize("NFC", text).lower():
        mark = unicodedata.category(char).startswith("M")
        if not (mark or char.isalnum()):
            inside = grows = False
        elif inside and (mark or (grows and not _alone(char))):
            pieces[-1] += char
        elif not mark:
            pieces.append(char)
            inside, grows = True, not _alone(char)
    return pieces


def rouge(output: str, reference: str) -> tuple[float, float, float]:
    """Returns the F1 of ROUGE-1, ROUGE-2 and ROUGE-L, from 0 to 1; 0 where a text has no word, or no pair of words."""
    given, right = words(output), words(reference)
    pairs = [list(itertools.pairwise(side)) for side in (given, right)]
    one, two = _shared(given, right), _shared(*pairs)
    longest = common_subsequence(given, right)
    return (
        _f1(one, len(given) + len(right)),
        _f1(two, len(pairs[0]) + len(pairs[1])),
        _f1(longest, len(given) + len(right)),
    )


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence, with one whole number as the row of the usual table.

    Hyyro, Bit-Parallel LCS-length Computation Revisited, AWOCA 2004, figure 2.
    """
    places = dict[str, int]()
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    row = full = (1 << len(first)) - 1
    for word in second:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(first) - row.bit_count()


def _alone(char: str) -> bool:
    return not char.isascii() and unicodedata.name(char, "").startswith(_UNSPACED)


def _shared(given: Sequence[object], right: Sequence[object]) -> int:
    return (Counter(given) & Counter(right)).total()


def _f1(common: int, sizes: int) -> float:
    """Returns the harmonic mean of common / given and common / right; `sizes` is the sum given + right."""
    return 2 * common / sizes if common else 0.0
