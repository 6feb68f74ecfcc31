"""The examples of a job in exactly as many places as the site's owner has declared."""

import torch

from offsite.errors import ConfigError
from offsite.task.examples import Examples
from offsite.task.spec import Batch


def in_places(examples: Batch, places: int) -> Examples:
    """Returns the first examples in so many places; a place without an example holds an empty example.

    How many blocks a text makes is up to the job's tokenizer. With a fixed number of places, neither a refusal nor the
    noise depends on what the tokenizer made of the texts.

    Args:
      examples: blocks of the texts.
      places: declared number of examples, >= 1.

    Raises:
      ConfigError: the examples are no blocks of text.
    """
    if not isinstance(examples, Examples):
        raise ConfigError("split='blocks': the examples of this task are its records; ask for split truncate")
    kept = examples.select(range(min(len(examples), places)))
    if missing := places - len(kept):
        width = kept.input_ids.shape[1]
        empty = torch.zeros(missing, width, dtype=torch.long)
        mask = torch.cat([kept.attention_mask, empty])
        answers = None if kept.answers is None else torch.cat([kept.answers, empty])
        return Examples(torch.cat([kept.input_ids, empty]), mask, answers)
    return kept
