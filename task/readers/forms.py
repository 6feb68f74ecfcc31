"""Where a record's fields stand in a row: columns, columns inside of columns, and forms that the field's tools write.

Such forms are ShareGPT's conversations, and SQuAD's answers with their places.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from offsite.task.readers.columns import Columns
from offsite.task.readers.rows import Broken
from offsite.task.readers.squad_answers import ANSWER, IMPOSSIBLE, START, answer_fields
from offsite.task.record_fields import ANSWERS

MESSAGES, CONVERSATIONS = "messages", "conversations"  # a field, and ShareGPT's column for it

# Sender of a message in ShareGPT's form -> role in a chat template.
SENDERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


class Missing(Exception):
    """A row has no column of this name."""


@dataclass(frozen=True)
class Layout:
    """The columns that a record's fields are read from, in a file or in one row.

    Attributes:
      columns: field -> column as the user names it.
      names: field -> name of the column in the file; `a.b` stands for `b` inside of `a`, if no column has that name.
        Beside the fields, SQuAD's `is_impossible` where the file has that column.
      squad: whether answer and place of the answer stand together in SQuAD's form.
    """

    columns: Columns
    names: Mapping[str, str]
    squad: bool

    @classmethod
    def of(cls, columns: Columns, present: Callable[[str], bool]) -> "Layout":
        """Returns the layout for a file or a row.

        Args:
          columns: columns that the user names.
          present: function that says whether the file or the row has a column of a name.
        """
        names = {field: column.name for field, column in columns.items()}
        if names.get(MESSAGES) == MESSAGES and not present(MESSAGES) and present(CONVERSATIONS):
            names[MESSAGES] = CONVERSATIONS
        squad = False
        if ANSWER in names and START in names and (names[ANSWER] == names[START] or not present(names[START])):
            held = ANSWERS if names[ANSWER] == ANSWER else names[ANSWER]
            if squad := present(held):
                names[ANSWER] = names[START] = held
        if ANSWER in names and START in names and present(IMPOSSIBLE):
            names[IMPOSSIBLE] = IMPOSSIBLE
        return cls(columns, names, squad)

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the value of each field, and of SQuAD's form also `ANSWERS`; see `squad_answers.answer_fields`.

        Args:
          row: column -> value.

        Raises:
          Missing: the row has no such column.
          Broken: a value is not of its form.
        """
        values = {field: row[name] if name in row else _inside(row, name) for field, name in self.names.items()}
        if ANSWER in values and START in values:
            none = values.pop(IMPOSSIBLE, None)
            values |= answer_fields(values[ANSWER], values[START], none, together=self.squad)
        if MESSAGES in values:
            values[MESSAGES] = _messages(values[MESSAGES])
        return values


def has(row: Mapping[str, Any], name: str) -> bool:
    """Says whether a row has a column, or a column inside of another."""
    try:
        _ = None if name in row else _inside(row, name)
    except Missing:
        return False
    return True


def names_in(row: Mapping[str, Any]) -> list[str]:
    """Returns the columns of a row with the columns inside of them, for messages."""
    found = list[str]()
    for name, value in row.items():
        found += [name, *(f"{name}.{inner}" for inner in value)] if isinstance(value, dict) else [name]
    return found


def _inside(row: Mapping[str, Any], name: str) -> Any:
    """Returns the value at `a.b.c`; None where a value on the way is None, as files with a schema have it."""
    first, *parts = name.split(".")
    if not parts or first not in row:
        raise Missing(name)
    value = row[first]
    for part in parts:
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            raise Missing(name)
        value = value[part]
    return value


def _messages(value: Any) -> Any:
    """Returns messages of role and content; from ShareGPT's form of from and value, and from an object of lists.

    What has none of these forms stays as it is, and the task refuses it.
    """
    lists = list(value.values()) if isinstance(value, Mapping) else []
    if lists and all(isinstance(column, list) and len(column) == len(lists[0]) for column in lists):
        value = [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]
    return [_message(message) for message in value] if isinstance(value, list) else value


def _message(message: Any) -> Any:
    if not isinstance(message, Mapping) or message.get("role") is not None or not message.keys() >= {"from", "value"}:
        return message
    others = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
    sender = message["from"]
    if not isinstance(sender, str) or sender not in SENDERS:
        raise Broken(f"has a message whose `from` is none of {', '.join(SENDERS)}; write a role and a content instead")
    return {"role": SENDERS[sender], "content": message["value"], **others}
