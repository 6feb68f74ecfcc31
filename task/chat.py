"""Conversations: a causal language model learns the assistant's answers through its own chat template."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from offsite.task.causal_lm import CausalLM
from offsite.task.examples import Examples
from offsite.task.prompt_completion import answered
from offsite.task.record_fields import FIELDS
from offsite.task.records import check_split
from offsite.task.spec import Record
from offsite.task.token_rows import chat_rows


class Chat(CausalLM):
    """Causal language modelling of the assistant's answers.

    A message is passed on to the template with all its keys, as in transformers. A `weight` of 0, as in other chat
    services' files, says that an answer is read but not learnt.

    The template is a program by the model's owner, so it runs with the tokenizer in a separate process; see
    `task.tokenizer_process`.
    """

    name: ClassVar[str] = "chat"
    columns: ClassVar[Mapping[str, type]] = FIELDS["chat"]

    def encode(
        self, processor: Any, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> Examples:
        """Returns conversations as examples, cut on the right; all tokens of answers are learnt, also the template's.

        Raises:
          ConfigError: the length is too small, or the split is not "truncate".
          DataError: there is no record, a record is not a conversation, or the tokenizer has no chat template.
        """
        check_split(split, self.name)
        return answered(*chat_rows(processor, records, length), length)
