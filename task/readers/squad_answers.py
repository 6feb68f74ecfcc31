"""The right answers of a question as SQuAD writes them: several with their places, one, or none."""

from collections.abc import Mapping
from typing import Any

from offsite.task.readers.rows import Broken
from offsite.task.record_fields import ANSWERS

ANSWER, START = "answer", "answer_start"  # fields that SQuAD has in one column
TEXT = "text"  # SQuAD's name for an answer inside of its column
IMPOSSIBLE = "is_impossible"  # SQuAD 2.0's column that says whether a question has no answer
NOWHERE = -1  # place of the empty answer of a question that has no answer
_TRUTHS = {"true": True, "1": True, "false": False, "0": False, "": False, "none": False}


def answer_fields(answer: Any, start: Any, impossible: Any, *, together: bool) -> dict[str, Any]:
    """Returns the fields of the first answer, and `ANSWERS` with all answers where there are several.

    A question without an answer has an empty text at `NOWHERE`.

    Args:
      answer: text of the answer, a list of texts, or answers in SQuAD's form.
      start: place of the answer, or a list of places.
      impossible: value of SQuAD's column of this name; None where there is no such column.
      together: whether `answer` has SQuAD's form: an object of two lists, or a list of objects.

    Raises:
      Broken: the answers have another form, or contradict `impossible`.
    """
    none = _is_true(impossible)
    if none and (answer is None or answer == ""):
        return {ANSWER: "", START: NOWHERE}
    listed = isinstance(answer, list) and isinstance(start, list)
    pairs = _together(answer) if together else _pairs(answer, start) if listed else [(answer, start)]
    if none and any(text != "" for text, _ in pairs):
        raise Broken(f"says {IMPOSSIBLE}, and has an answer; keep one of both")
    if none or not pairs:
        return {ANSWER: "", START: NOWHERE}
    first = {ANSWER: pairs[0][0], START: pairs[0][1]}
    return first if len(pairs) == 1 else first | {ANSWERS: [_checked(*pair) for pair in pairs]}


def _together(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return _pairs(value.get(TEXT), value.get(START))
    if isinstance(value, list) and all(isinstance(answer, Mapping) for answer in value):
        return [(answer.get(TEXT), answer.get(START)) for answer in value]
    raise _unlike()


def _pairs(texts: Any, starts: Any) -> list[tuple[Any, Any]]:
    if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
        return list(zip(texts, starts, strict=True))
    raise _unlike()


def _unlike() -> Broken:
    return Broken(
        f"must have SQuAD's answers, {{{TEXT}: [...], {START}: [...]}} with as many texts as places; correct the row, "
        f"or give columns {ANSWER} and {START}"
    )


def _checked(text: Any, start: Any) -> dict[str, Any]:
    if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
        raise Broken(f"has an answer that is no text with a whole number as its place; correct {ANSWERS}")
    return {TEXT: text, START: start}


def _is_true(value: Any) -> bool:
    known = _TRUTHS.get(str(value).strip().lower()) if value is None or isinstance(value, bool | int | str) else None
    if known is None:
        raise Broken(f"has another value of {IMPOSSIBLE} than true or false; correct it")
    return known
