"""Conversations: a causal language model learns the assistant's answers through its own chat template."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from offsite.task.causal_lm import CausalLM
from offsite.task.examples import Examples
from offsite.task.prompt_completion import answered
from offsite.task.record_fields import FIELDS
from offsite.task.records import check_split, fault
from offsite.task.spec import Record

ASSISTANT = "assistant"


class Chat(CausalLM):
    """Causal language modelling of the assistant's answers.

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
        talks = [_messages(records, index) for index in range(len(records))]
        encoded = processor.chats(talks, length)
        return answered([ids for ids, _ in encoded], [flags for _, flags in encoded], length)


def _messages(records: Sequence[Record], index: int) -> list[dict[str, str]]:
    messages = records[index]["messages"]
    shaped = [isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
              for message in messages]  # fmt: skip
    if not shaped or not all(shaped):
        fault(records, index, "messages", "must be a list of {role, content} with two texts; correct the field")
        return []
    if not any(message["role"] == ASSISTANT for message in messages):
        fault(
            records, index, "messages", "must have a message with role 'assistant' to learn; add or remove the record"
        )
        return []
    return [{"role": message["role"], "content": message["content"]} for message in messages]
