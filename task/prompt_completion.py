"""Answers to prompts: a causal language model learns the completion, and nothing of the prompt."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from offsite.errors import DataError
from offsite.task.causal_lm import CausalLM
from offsite.task.encode import check_length, end_of, mask_of, padded
from offsite.task.examples import Examples
from offsite.task.records import check_split
from offsite.task.spec import Record


class PromptCompletion(CausalLM):
    """Causal language modelling of completions; loss and perplexity are those of their tokens alone."""

    name: ClassVar[str] = "prompt_completion"
    columns: ClassVar[Mapping[str, type]] = {"prompt": str, "completion": str}

    def encode(
        self, processor: Any, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> Examples:
        """Returns records as examples: prompt, completion and end-of-text token, cut on the right.

        The two texts become tokens each for itself, so it is known which is whose. A record of which nothing is left of
        the completion, or of which the tokenizer makes nothing, is an example without a target.

        Raises:
          ConfigError: the length is too small, or the split is not "truncate".
          DataError: there is no record.
        """
        check_split(split, self.name)
        prompts = processor.tokens([record["prompt"] for record in records])
        completions = processor.tokens([record["completion"] for record in records])
        end = end_of(processor)
        pairs = [(prompt, [*done, *end] if done else []) for prompt, done in zip(prompts, completions, strict=True)]
        rows = [(prompt + done)[:length] for prompt, done in pairs]
        answers = [([0] * len(prompt) + [1] * len(done))[:length] for prompt, done in pairs]
        return answered(rows, answers, length)


def answered(rows: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], length: int) -> Examples:
    """Returns token sequences as examples of which only the answers are learnt.

    Args:
      rows: tokens, at most `length` each.
      answers: 1 on each token that is learnt, else 0.
      length: tokens per example, >= 2.

    Raises:
      ConfigError: the length is too small.
      DataError: there is no row.
    """
    check_length(length)
    if not rows:
        raise DataError(f"examples=0 at length={length}; give records")
    table: torch.Tensor = padded(rows, length)
    return Examples(table, mask_of(rows, length), padded(answers, length))
