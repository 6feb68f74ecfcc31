"""How token ids become rows of one length: the tokens around a text, and the splits that a job may have."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from offsite.errors import ConfigError

SHORTEST = 2  # tokens; a shorter record has no next token to predict
JOINED = "joined"  # key of the split for public texts alone, see `PUBLIC_SPLITS`


@dataclass(frozen=True)
class Frame:
    """The tokens around each text of a causal language model.

    They are those of the tokenizer's own rule (its post-processor), as in transformers. Beyond that rule, a whole text
    ends with the end-of-text token, so that the model learns where to stop. No token is doubled: a text that already
    begins or ends with these tokens, because a person wrote them, keeps its own.

    Attributes:
      start: ids in front of a text, such as the beginning-of-text token.
      end: ids behind a text by the tokenizer's own rule.
      stop: the end-of-text token in a list; empty where `end` has it, or where there is no such token.
    """

    start: list[int]
    end: list[int]
    stop: list[int]

    @classmethod
    def of(cls, tokenizer: Any) -> "Frame":
        """Returns the tokens that a `task.tokenizer.Tokenizer` puts around a text."""
        eos = tokenizer.eos_token_id
        return cls(tokenizer.start, tokenizer.end, [] if eos is None or eos in tokenizer.end else [int(eos)])

    def begun(self, tokens: list[int]) -> list[int]:
        """Returns a text's tokens with their beginning."""
        return tokens if tokens[: len(self.start)] == self.start else self.start + tokens

    def ended(self, tokens: list[int]) -> list[int]:
        """Returns a whole text's tokens with their end."""
        last = self.end + self.stop
        return tokens if last and tokens[-len(last) :] == last else tokens + last

    def bare(self, tokens: list[int]) -> list[int]:
        """Returns a text's tokens without a beginning that the text brings itself."""
        return tokens[len(self.start) :] if self.start and tokens[: len(self.start)] == self.start else tokens


def check_length(length: int) -> None:
    """Refuses examples without room for a target.

    Raises:
      ConfigError: the length is below 2 tokens.
    """
    if length < SHORTEST:
        raise ConfigError(f"length={length} must be at least {SHORTEST} tokens; 128 is usual")


def _blocks(documents: list[list[int]], frame: Frame, length: int) -> list[list[int]]:
    room = length - len(frame.start)
    return [
        frame.start + piece
        for tokens in documents
        for piece in _cut(frame.ended(frame.bare(tokens)) if tokens else [], room)
    ]


def _cut(tokens: list[int], length: int) -> list[list[int]]:
    """Returns a text's full blocks; a text shorter than a block is one block."""
    return [tokens[at : at + length] for at in range(0, max(len(tokens) - length, 0) + 1, length)]


def _joined(documents: list[list[int]], frame: Frame, length: int) -> list[list[int]]:
    whole = (frame.ended(frame.bare(tokens)) for tokens in documents if tokens)
    stream, room = list(itertools.chain.from_iterable(whole)), length - len(frame.start)
    return [frame.start + stream[at : at + room] for at in range(0, len(stream) - room + 1, room)]


def _truncate(documents: list[list[int]], frame: Frame, length: int) -> list[list[int]]:
    return [_row(frame.begun(tokens), frame, length) if tokens else [] for tokens in documents]


def _row(tokens: list[int], frame: Frame, length: int) -> list[int]:
    """Returns one example: a text that is cut keeps the end of the tokenizer's own rule, as in transformers."""
    if len(tokens) < SHORTEST:
        return []
    if len(tokens) + len(frame.end) > length:
        return tokens[: length - len(frame.end)] + frame.end
    return frame.ended(tokens)[:length]


_Cut = Callable[[list[list[int]], Frame, int], list[list[int]]]
SPLITS: dict[str, _Cut] = {"blocks": _blocks, "truncate": _truncate}  # the splits that a job may have
# Splits of public texts; under "joined" records would share state, so no job may have it.
PUBLIC_SPLITS: dict[str, _Cut] = {**SPLITS, JOINED: _joined}
