"""Conversations: a causal language model learns the assistant's answers through its own chat template."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from offsite.task.causal_lm import CausalLM
from offsite.task.conversations import ASSISTANT, messages_of
from offsite.task.examples import Examples
from offsite.task.generation import Prompt, end_of_answer
from offsite.task.prompt_completion import answered
from offsite.task.record_fields import FIELDS
from offsite.task.records import check_split
from offsite.task.spec import Record
from offsite.task.token_rows import chat_rows

ANSWER = "b"
PLAIN = ({"role": "user", "content": "a"}, {"role": ASSISTANT, "content": ANSWER})  # a trial of a template


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

    def prompts(
        self, processor: Any, records: Sequence[Record], *, length: int, model_config: Any
    ) -> list[Prompt | None]:
        """Returns the messages before an answer, with the template's prompt; see `task.generation.GeneratingTask`.

        Of a conversation's learnt answers that have a text, the last counts whose prompt has room. A text ends where
        the template ends an answer, too.
        """
        talks = [messages_of(records, index, processor.template) for index in range(len(records))]
        left = {index: _answers(talk) for index, talk in enumerate(talks)}
        ends, prompts = end_of_answer(processor, PLAIN, ANSWER), list[Prompt | None]([None] * len(talks))
        while left := {index: places for index, places in left.items() if places and prompts[index] is None}:
            asked = {index: places.pop() for index, places in left.items()}
            encoded = processor.prompts([talks[index][:place] for index, place in asked.items()], length + 1)
            for (index, place), ids in zip(asked.items(), encoded, strict=True):
                if 0 < len(ids) <= length:
                    prompts[index] = Prompt.of(ids, text_of(talks[index][place]), ends)
        return prompts


def text_of(message: Mapping[str, Any]) -> str:
    """Returns the text of a message, whose content may be a list of parts; empty where the message has none."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if isinstance(part.get("text"), str))


def _answers(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns the places of the learnt answers that have a text."""
    answers = [place for place, message in enumerate(messages) if message["role"] == ASSISTANT]
    return [place for place in answers if messages[place].get("weight") != 0 and text_of(messages[place]).strip()]
