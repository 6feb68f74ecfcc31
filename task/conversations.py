"""The messages of a conversation, as a chat template gets them, and the rules that they keep to."""

from collections.abc import Mapping, Sequence
from typing import Any

from offsite.task.records import fault
from offsite.task.spec import Record

ASSISTANT = "assistant"
INSTEAD = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")  # what may stand for a content
DEEPEST = 32  # lists and objects inside each other in one message
# Keys of an answer that are a part of what the model says, by names of the same thing; a template must read them.
UNDERSTOOD = (("tool_calls",), ("function_call",), ("reasoning_content", "thinking", "reasoning"))


def messages_of(records: Sequence[Record], index: int, template: str) -> list[dict[str, Any]]:
    """Returns a record's messages with all their keys that have a value; an empty list for a faulty record."""
    messages = [_message(message) for message in records[index]["messages"]]
    rule = _fault_of(messages, template)
    if rule:
        fault(records, index, "messages", rule)
        return []
    return [message for message in messages if message is not None]


def _message(message: Any) -> dict[str, Any] | None:
    """Returns a message without the keys that have no value, as transformers passes it on; None if it is none.

    A table of columns gives every message all keys.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not _is_json(message):
        return None
    kept = {key: value for key, value in message.items() if value is not None}
    content = kept.get("content")
    parts = isinstance(content, list) and all(isinstance(part, Mapping) and "type" in part for part in content)
    said = isinstance(content, str) or parts or (content is None and any(kept.get(key) for key in INSTEAD))
    return kept if said else None


def _fault_of(messages: Sequence[dict[str, Any] | None], template: str) -> str:
    """Returns the rule that the messages break; an empty text for a conversation to learn from."""
    if not messages or None in messages:
        return "must be a list of {role, content} with two texts, or parts or tool_calls as content; correct the field"
    answers = [message for message in messages if message is not None and message["role"] == ASSISTANT]
    if any(message.get("weight", 1) not in (0, 1) for message in answers):
        return "must have weights of 0, not learnt, or 1; correct the field"
    for names in UNDERSTOOD:
        unread = template and not any(name in template for name in names)
        if unread and any(message.get(name) for message in answers for name in names):
            return (
                f"an answer has {names[0]}, which the model's chat template does not read, so the model would learn "
                "an answer without it; take another template, or put it into content"
            )
    if all(message.get("weight") == 0 for message in answers):
        return "must have a message with role 'assistant' to learn; add or remove the record"
    return ""


def _is_json(value: Any, room: int = DEEPEST) -> bool:
    """Says whether a value is JSON, and not so deep that one record could exhaust Python's stack."""
    if isinstance(value, Mapping):
        return room > 0 and all(isinstance(key, str) and _is_json(part, room - 1) for key, part in value.items())
    if isinstance(value, list | tuple):
        return room > 0 and all(_is_json(part, room - 1) for part in value)
    return value is None or isinstance(value, str | int | float)
