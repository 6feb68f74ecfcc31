"""Conversations: a causal language model learns the assistant's answers, through its own chat template."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from offsite.task.causal_lm import CausalLM
from offsite.task.examples import Examples
from offsite.task.prompt_completion import answered
from offsite.task.records import check_split, fault
from offsite.task.spec import Record

ASSISTANT = "assistant"


class Chat(CausalLM):
    """Causal language modelling of the assistant's answers.

    The template is a program of the model's owner, so it runs where the tokenizer does, in a process of its own; see
    `task.tokenizer_process`.
    """

    name: ClassVar[str] = "chat"
    columns: ClassVar[Mapping[str, type]] = {"messages": list}

    def encode(
        self, processor: Any, records: Sequence[Record], *, length: int, split: str, model_config: Any
    ) -> Examples:
        """Returns conversations as examples, cut on the right; all tokens of answers are learnt, also the template's.

        Raises:
          ConfigError: the length is too small, or the split is not "truncate".
          DataError: there is no record, one is no conversation, or the tokenizer has no chat template.
        """
        check_split(split, self.name)
        talks = [_messages(records, index) for index in range(len(records))]
        found = processor.chats(talks, length)
        return answered([ids for ids, _ in found], [flags for _, flags in found], length)


def _messages(records: Sequence[Record], index: int) -> list[dict[str, str]]:
    messages = records[index]["messages"]
    shaped = [isinstance(one, Mapping) and all(isinstance(one.get(key), str) for key in ("role", "content"))
              for one in messages]  # fmt: skip
    if not shaped or not all(shaped):
        fault(records, index, "messages", "must be a list of {role, content}, both texts; correct it")
        return []
    if not any(one["role"] == ASSISTANT for one in messages):
        fault(records, index, "messages", "no message has role 'assistant', so there is nothing to learn")
        return []
    return [{"role": one["role"], "content": one["content"]} for one in messages]
