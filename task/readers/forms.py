"""Where a record's fields stand in a row: columns, columns inside of columns, and forms that the field's tools write.

Such forms are ShareGPT's conversations, and SQuAD's answers with their places.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from offsite.task.readers.columns import Columns

MESSAGES, CONVERSATIONS = "messages", "conversations"  # a field, and ShareGPT's column for it
ANSWER, START = "answer", "answer_start"  # fields that SQuAD has in one column
ANSWERS = "answers"  # SQuAD's column
TEXT = "text"  # SQuAD's name for an answer inside of its column
NOWHERE = -1  # place of the empty answer of a question that has no answer

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


class Broken(Exception):
    """A row breaks a rule of a form; the text is the rule, and holds nothing of the row."""


@dataclass(frozen=True)
class Layout:
    """The columns that a record's fields are read from, in a file or in one row.

    Attributes:
      columns: field -> column as the user names it.
      names: field -> name of the column in the file; `a.b` stands for `b` inside of `a`, if no column has that name.
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
        return cls(columns, names, squad)

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the value of each field; of a question without an answer an empty text at -1.

        Args:
          row: column -> value.

        Raises:
          Missing: the row has no such column.
          Broken: a value is not of its form.
        """
        values = {field: row[name] if name in row else _inside(row, name) for field, name in self.names.items()}
        if self.squad:
            values[ANSWER], values[START] = _first_answer(values[ANSWER])
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


def _first_answer(value: Any) -> tuple[Any, Any]:
    """Returns the first answer of SQuAD's form, with its place; an empty text at `NOWHERE` where there is none.

    The form is an object of two lists, or a list of objects.
    """
    if isinstance(value, Mapping):
        texts, starts = value.get(TEXT), value.get(START)
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            return (texts[0], starts[0]) if texts else ("", NOWHERE)
    elif isinstance(value, list) and all(isinstance(answer, Mapping) for answer in value):
        return (value[0].get(TEXT), value[0].get(START)) if value else ("", NOWHERE)
    raise Broken(
        f"must have SQuAD's answers, {{{TEXT}: [...], {START}: [...]}} with as many texts as places; correct the row, "
        f"or give columns {ANSWER} and {START}"
    )


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
