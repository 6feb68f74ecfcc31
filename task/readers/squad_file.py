"""Cuts SQuAD's own form, articles of paragraphs with their questions, into one row for each question.

The cuts follow brackets and commas outside of strings, whatever else stands in a question, so that a broken question is
one broken row and the number of rows stays.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from offsite.task.readers.columns import Columns
from offsite.task.readers.squad_answers import ANSWER, START

PARAGRAPHS, QUESTIONS = "paragraphs", "qas"
CONTEXT, QUESTION = "context", "question"  # fields of the task that reads such files
_DEEP = 6  # brackets inside of each other that are skipped at once: those of an article around an answer
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_KEY = re.compile(rb'\s*"((?:[^"\\]++|\\.)*+)"\s*:\s*', re.DOTALL)
_Members = dict[str, tuple[int, bytes]]  # key of an object -> offset and text of its value


@dataclass(frozen=True)
class Question:
    """One question of an element.

    Attributes:
      place: place of the question in the element, for example `paragraph=2 question=1`; empty where the element is the
        row.
      line: line on which the question begins.
      texts: texts of the objects whose members make up the row: the article and the paragraph without their lists, and
        the question.
    """

    place: str
    line: int
    texts: tuple[bytes, ...]


def questions(text: bytes, line: int, columns: Columns) -> Iterator[Question]:
    """Yields the questions of an article or of a paragraph; any other element is a row of its own.

    Args:
      text: text of one element of a list, or of one line.
      line: line on which the element begins.
      columns: columns that are read; only a task of questions with contexts reads the form.
    """
    asked = all(field in columns for field in (QUESTION, CONTEXT, ANSWER, START))
    nested = asked and (b'"qas"' in text or b'"paragraphs"' in text)
    text = text.strip() if nested else text
    found = _members(text) if nested else _Members()
    if nested and columns[QUESTION].name in found:  # columns that stand there come before a form
        found = _Members()
    if _is_list(found, PARAGRAPHS):
        begin, paragraphs = found[PARAGRAPHS]
        lines, article = _Lines(text, line), (_without(text, begin, paragraphs),)
        for number, (offset, paragraph) in enumerate(_parts(paragraphs), start=1):
            at, place = lines.at(begin + offset), f"paragraph={number}"
            inside = _members(paragraph)
            if _is_list(inside, QUESTIONS):
                yield from _of_paragraph(paragraph, at, inside, f"{place} ", article)
            else:
                yield Question(place, at, (paragraph,))
    elif _is_list(found, QUESTIONS):
        yield from _of_paragraph(text, line, found, "", ())
    else:
        yield Question("", line, (text,))


def _of_paragraph(
    text: bytes, line: int, members: _Members, place: str, article: tuple[bytes, ...]
) -> Iterator[Question]:
    begin, listed = members[QUESTIONS]
    shared = (*article, _without(text, begin, listed))
    lines = _Lines(text, line)
    for number, (offset, question) in enumerate(_parts(listed), start=1):
        yield Question(f"{place}question={number}", lines.at(begin + offset), (*shared, question))


def _without(text: bytes, begin: int, listed: bytes) -> bytes:
    """Returns the text of an object with an empty list in the place of one of its lists."""
    return b"".join((text[:begin], b"[]", text[begin + len(listed) :]))


def _is_list(members: _Members, key: str) -> bool:
    return key in members and members[key][1].startswith(b"[") and members[key][1].endswith(b"]")


def _members(text: bytes) -> _Members:
    """Returns the offset and the text of each value of an object; what is no member is left out."""
    found = _Members()
    for offset, part in _parts(text) if text.startswith(b"{") else ():
        if key := _KEY.match(part):
            found[key.group(1).decode(errors="replace")] = offset + key.end(), part[key.end() :]
    return found


def _skipped() -> re.Pattern[bytes]:
    """Returns the pattern of what has no mark outside of strings and of brackets that are closed again."""
    inside = rb'[^"\[\]{}]++|' + _STRING
    closed = rb"[\[{](?:" + inside + rb")*+[\]}]"
    for _ in range(1, _DEEP):
        closed = rb"[\[{](?:" + inside + rb"|" + closed + rb")*+[\]}]"
    return re.compile(rb'(?:[^"\[\]{},]++|' + _STRING + rb"|" + closed + rb")*+", re.DOTALL)


_SKIPPED = _skipped()


def _parts(text: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the offset and the text of each part of a list or an object; nothing of an empty one.

    Whatever stands behind the closing bracket is one more part, so that nothing is left out without a word.
    """
    depth, begin, at = 1, 1, 1
    while at < len(text) and depth:
        at = _SKIPPED.match(text, at).end()  # type: ignore[union-attr]  # the pattern matches nothing, too
        mark = text[at : at + 1]
        closes = mark in (b"]", b"}")
        if depth == 1 and (closes or mark == b","):
            part = text[begin:at].strip()
            if part or begin > 1 or not closes:
                yield begin + text[begin:at].index(part), part
            begin = at + 1
        depth += (mark in (b"[", b"{")) - closes
        at += 1
    if at < len(text):
        yield at, text[at:].strip()


class _Lines:
    """Counts the lines of a text up to offsets that never go back."""

    def __init__(self, text: bytes, line: int) -> None:
        self._text, self._line, self._offset = text, line, 0

    def at(self, offset: int) -> int:
        """Returns the line of an offset."""
        self._line += self._text.count(b"\n", self._offset, offset)
        self._offset = offset
        return self._line
