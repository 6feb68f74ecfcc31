"""Questions with their contexts as windows of one length, and the words of a context behind tokens.

A context that does not fit is cut into windows that overlap, each after the whole question, as readers of SQuAD do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from offsite.task.tokenizer import Encoding

OVERLAP = 128  # tokens of context that two neighbouring windows share; half of a window where that is less
NO_ANSWER = (-1, -1)  # in the place of a span where the context has no answer
_CONTEXT = 1  # index of the context in a pair
Span: TypeAlias = tuple[int, int]  # range of characters; the end is not in the range
Window: TypeAlias = tuple[int, int]  # range of tokens, likewise
Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Passage:
    """One record for a reader: the tokens of question and context, uncut, and the answer among them.

    Of several right answers the first that a window holds whole is learnt, or the first of all where no window does.

    Attributes:
      text: text in which the answers stand.
      spans: characters of each right answer in the text; `NO_ANSWER` alone, or nothing for a record that could not be
        read.
      truths: texts of all right answers, with those that stand elsewhere; see `task.answer_text.highest`.
      may_be_none: whether a prediction may be that there is no answer.
      length: tokens of a window, with question and special tokens.
      ids, types, starts, ends: see `task.tokenizer.Encoding`, int32 (n,); no element where the tokenizer failed.
      first, end: index of the context's first token, and of the token after its last.
      span: characters of the answer to learn; `NO_ANSWER`, or None for a record that could not be read.
      tokens: first and last token of the answer; None where no token stands for the answer.
      shown: range of the context's tokens in the window to learn from; None where no window fits.
    """

    text: str = field(repr=False)
    spans: tuple[Span, ...] = field(repr=False)
    truths: tuple[str, ...] = field(repr=False)
    may_be_none: bool
    length: int
    ids: Tokens = field(repr=False)
    types: Tokens = field(repr=False)
    starts: Tokens = field(repr=False)
    ends: Tokens = field(repr=False)
    first: int
    end: int
    span: Span | None = field(init=False, repr=False)
    tokens: tuple[int, int] | None = field(init=False, repr=False)
    shown: Window | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Chooses the answer to learn, and finds its tokens and the window with them."""
        tried: list[tuple[Span | None, tuple[int, int] | None]] = [(span, self._tokens(span)) for span in self.spans]
        found = [(span, tokens, self._shown(tokens)) for span, tokens in tried or [(None, None)]]
        chosen = next((one for one in found if _holds(one[2], one[1])), found[0])
        for name, value in zip(("span", "tokens", "shown"), chosen, strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls,
        text: str,
        spans: Sequence[Span],
        encoding: Encoding,
        length: int,
        *,
        may_be_none: bool,
        truths: Sequence[str] = (),
    ) -> "Passage":
        """Returns the passage of an encoded pair.

        Args:
          text: text in which the answers stand.
          spans: characters of each right answer, or `NO_ANSWER` alone, or nothing.
          encoding: question and context with special tokens, uncut.
          length: tokens of a window.
          may_be_none: whether a prediction may be that there is no answer.
          truths: texts of all right answers.
        """
        inside = [number for number, which in enumerate(encoding.sequences) if which == _CONTEXT]
        first, end = (inside[0], inside[-1] + 1) if inside else (len(encoding.ids), len(encoding.ids))
        ids, types, starts, ends = (
            np.array(column, np.int32) for column in (encoding.ids, encoding.types, encoding.starts, encoding.ends)
        )
        places = length, ids, types, starts, ends, first, end
        return cls(text, tuple(spans), tuple(truths), may_be_none, *places)

    @property
    def room(self) -> int:
        """Number of tokens of context in a window; 0 or less where the question alone is too long."""
        return self.length - (len(self.ids) - (self.end - self.first))

    def windows(self) -> list[Window]:
        """Returns the context's tokens in each window, in order; none where question or context leave no room."""
        if self.room < 1 or self.first == self.end:
            return []
        step = max(self.room - min(OVERLAP, self.room // 2), 1)
        after = max(self.end - self.first - self.room, 0)  # tokens that the first window does not hold
        begins = [self.first + step * number for number in range(-(-after // step) + 1)]
        return [(begin, min(begin + self.room, self.end)) for begin in begins]

    def encoding_of(self, window: Window | None) -> Encoding:
        """Returns a window with the question and the special tokens around it; an empty encoding without a window."""
        if window is None:
            return Encoding([], [], [], [], [], [])
        at = np.r_[0 : self.first, window[0] : window[1], self.end : len(self.ids)]
        inside = [_CONTEXT if self.first <= place < self.end else -1 for place in at.tolist()]
        ids, types, starts, ends = (column[at].tolist() for column in (self.ids, self.types, self.starts, self.ends))
        return Encoding(ids, types, inside, [-1] * len(ids), starts, ends)

    def context_of(self, window: Window | None) -> list[int]:
        """Returns 1 for each token of a window that is context, 0 for each before."""
        return [] if window is None else [0] * self.first + [1] * (window[1] - window[0])

    def words(self, first: int, last: int) -> str:
        """Returns the text from one token of the uncut pair to another."""
        return self.text[self.starts[first] : self.ends[last]]

    def _tokens(self, span: Span) -> tuple[int, int] | None:
        if span == NO_ANSWER:
            return None
        starts, ends = self.starts[self.first : self.end], self.ends[self.first : self.end]
        inside = np.flatnonzero((starts < span[1]) & (ends > span[0])) + self.first
        return (int(inside[0]), int(inside[-1])) if len(inside) else None

    def _shown(self, tokens: tuple[int, int] | None) -> Window | None:
        """Returns the window in which the answer has the most context on its shorter side, the first of equals.

        An answer that is too long for the overlap of two windows gets a window that begins with the answer.
        """
        windows = self.windows()
        if tokens is None or not windows:
            return windows[0] if windows else None
        first, last = tokens
        holding = [window for window in windows if _holds(window, tokens)]
        if not holding and last - first < self.room:
            return first, min(first + self.room, self.end)
        return max(holding or windows[:1], key=lambda window: min(first - window[0], window[1] - 1 - last))


def _holds(window: Window | None, tokens: tuple[int, int] | None) -> bool:
    """Says whether a window holds an answer whole."""
    return window is not None and tokens is not None and window[0] <= tokens[0] and tokens[1] < window[1]
