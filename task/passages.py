"""Questions with their contexts as windows of one length, and the words of a context behind tokens.

A context that does not fit is cut into windows that overlap, each after the whole question, as readers of SQuAD do.
"""

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

    Attributes:
      text: text in which the answer stands.
      span: characters of the answer in the text; `NO_ANSWER`, or None for a record that could not be read.
      may_be_none: whether a prediction may be that there is no answer.
      length: tokens of a window, with question and special tokens.
      ids, types, starts, ends: see `task.tokenizer.Encoding`, int32 (n,); no element where the tokenizer failed.
      first, end: index of the context's first token, and of the token after its last.
      tokens: first and last token of the answer; None where no token stands for the answer.
      shown: range of the context's tokens in the window to learn from; None where no window fits.
    """

    text: str = field(repr=False)
    span: Span | None = field(repr=False)
    may_be_none: bool
    length: int
    ids: Tokens = field(repr=False)
    types: Tokens = field(repr=False)
    starts: Tokens = field(repr=False)
    ends: Tokens = field(repr=False)
    first: int
    end: int
    tokens: tuple[int, int] | None = field(init=False, repr=False)
    shown: Window | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Finds the answer's tokens, and the window with them."""
        object.__setattr__(self, "tokens", self._tokens())
        object.__setattr__(self, "shown", self._shown())

    @classmethod
    def of(cls, text: str, span: Span | None, encoding: Encoding, length: int, *, may_be_none: bool) -> "Passage":
        """Returns the passage of an encoded pair.

        Args:
          text: text in which the answer stands.
          span: characters of the answer, or `NO_ANSWER`, or None.
          encoding: question and context with special tokens, uncut.
          length: tokens of a window.
          may_be_none: whether a prediction may be that there is no answer.
        """
        inside = [number for number, which in enumerate(encoding.sequences) if which == _CONTEXT]
        first, end = (inside[0], inside[-1] + 1) if inside else (len(encoding.ids), len(encoding.ids))
        ids, types, starts, ends = (
            np.array(column, np.int32) for column in (encoding.ids, encoding.types, encoding.starts, encoding.ends)
        )
        return cls(text, span, may_be_none, length, ids, types, starts, ends, first, end)

    @property
    def answer(self) -> str:
        """The right answer; empty where the context has no answer."""
        return self.text[self.span[0] : self.span[1]] if self.span and self.span != NO_ANSWER else ""

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

    def _tokens(self) -> tuple[int, int] | None:
        if self.span is None or self.span == NO_ANSWER:
            return None
        starts, ends = self.starts[self.first : self.end], self.ends[self.first : self.end]
        inside = np.flatnonzero((starts < self.span[1]) & (ends > self.span[0])) + self.first
        return (int(inside[0]), int(inside[-1])) if len(inside) else None

    def _shown(self) -> Window | None:
        """Returns the window in which the answer has the most context on its shorter side, the first of equals.

        An answer that is too long for the overlap of two windows gets a window that begins with the answer.
        """
        windows = self.windows()
        if self.tokens is None or not windows:
            return windows[0] if windows else None
        first, last = self.tokens
        holding = [window for window in windows if window[0] <= first and last < window[1]]
        if not holding and last - first < self.room:
            return first, min(first + self.room, self.end)
        return max(holding or windows[:1], key=lambda window: min(first - window[0], window[1] - 1 - last))
