"""Answers to prompts: a causal language model learns the completion, but not the prompt."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from offsite.errors import DataError
from offsite.task.causal_lm import CausalLM
from offsite.task.encode import mask_of, padded
from offsite.task.examples import Examples
from offsite.task.generation import Prompt
from offsite.task.record_fields import FIELDS
from offsite.task.records import check_split
from offsite.task.spec import Record
from offsite.task.splits import Frame, check_length
from offsite.task.token_rows import prompted_rows


class PromptCompletion(CausalLM):
    """Causal language modelling of completions; loss and perplexity cover only the tokens of completions."""

    name: ClassVar[str] = "prompt_completion"
    columns: ClassVar[Mapping[str, type]] = FIELDS["prompt_completion"]

    def encode(
        self, processor: Any, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> Examples:
        """Returns records as examples: prompt, completion and the tokens around a text, cut on the right.

        Prompt and completion are tokenised separately, so each token belongs to one of the two texts. A record becomes
        an example without a target if the cut leaves nothing of the completion, or if the tokenizer fails.

        Raises:
          ConfigError: the length is too small, or the split is not "truncate".
          DataError: there is no record.
        """
        check_split(split, self.name)
        return answered(*prompted_rows(processor, records, length), length)

    def prompts(
        self, processor: Any, records: Sequence[Record], *, length: int, model_config: Any
    ) -> list[Prompt | None]:
        """Returns each record's prompt with the tokens in front of a text; see `task.generation.GeneratingTask`."""
        frame = Frame.of(processor)
        rows = map(frame.begun, processor.tokens([record["prompt"] for record in records], length))
        pairs = zip(rows, (record["completion"] for record in records), strict=True)
        return [Prompt.of(ids, text) if 0 < len(ids) < length and text.strip() else None for ids, text in pairs]


def answered(rows: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], length: int) -> Examples:
    """Returns token sequences as examples; only the tokens of answers are learnt.

    Args:
      rows: token ids of each example, at most `length` each.
      answers: 1 for each token that is learnt, else 0, in the shape of `rows`.
      length: tokens of each example, >= 2.

    Raises:
      ConfigError: the length is too small.
      DataError: there is no row.
    """
    check_length(length)
    if not rows:
        raise DataError(f"examples=0 at length={length} must be at least 1; give records")
    table: torch.Tensor = padded(rows, length)
    return Examples(table, mask_of(rows, length), padded(answers, length))
