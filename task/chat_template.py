"""Chat templates as transformers renders them, and the answers in a rendered conversation.

A part of the tokenizer's program (`tokenizer_process`), which loads this file by its path; so nothing of this package
is imported here. A template is a program by the model's owner: it runs in jinja's sandbox, without chance, without
memory of other records, and with the date of the settings in the place of a clock.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing; templates read the first or second
_MARK = "\ue000"  # of Unicode's private use area: no template writes this character by itself
Render = Callable[..., str]
Message = Mapping[str, Any]


def renderer(template: str, tokens: Mapping[str, str], date: str) -> Render:
    """Returns a chat template as a function from messages to text; raises any error of jinja.

    Globals, filters and arguments are those of transformers (`utils/chat_template_utils.py`), without `lipsum` and
    `random`: a record has the same tokens every time.
    """
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja needs a set here

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise ValueError(message)

    def strftime_now(form: str) -> str:
        return datetime.fromisoformat(date).strftime(form)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [Generation, loopcontrols]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": refuse, "strftime_now": strftime_now}
    del sandbox.globals["lipsum"], sandbox.filters["random"]
    compiled = sandbox.from_string(template)

    def render(messages: Sequence[Message], *, prompt: bool = False) -> str:
        shown = [_shown(message) for message in messages]
        return compiled.render(messages=shown, tools=None, documents=None, add_generation_prompt=prompt, **tokens)

    return render


def _shown(message: Message) -> dict[str, Any]:
    """Returns a message as a template sees it: no key without a value, and thoughts under each of their names."""
    shown = {key: value for key, value in message.items() if value is not None}
    thoughts = next((shown[key] for key in REASONING if key in shown), None)
    return shown if thoughts is None else {"thinking": thoughts, **shown, "reasoning_content": thoughts}


def answers_of(messages: Sequence[Message], render: Render) -> tuple[str, list[tuple[int, int]]]:
    """Returns a rendered conversation, and the range of each answer of the assistant in the text.

    The place of an answer follows from the template alone. The answer begins at the end of the rendered earlier
    messages with the prompt for an answer, and ends at the end of the rendered messages up to and including the answer.
    Where the prompt goes on with words that the answer does not repeat, for example an opened `<think>`, the answer
    begins where the two part. An answer that the template rewrites in the whole conversation (for example because
    earlier thoughts are stripped), or whose message has the weight 0, is not a target.
    """
    whole, spans = render(messages), []
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("weight") != 0:
            until = render(messages[: number + 1])
            start = _begin(messages[:number], until, render) if whole.startswith(until) else None
            if start is not None and start < len(until):
                spans.append((start, len(until)))
    return whole, spans


def _begin(earlier: Sequence[Message], until: str, render: Render) -> int | None:
    """Returns where an answer begins in the messages up to and including the answer; None where that is not clear."""
    try:
        before = render(earlier, prompt=True)
        if until.startswith(before):
            return len(before)
        plain = render(earlier)
        marked = render([*earlier, {"role": "assistant", "content": _MARK}])
    except Exception:  # for example a template that renders no conversation without a user
        return None
    # The parts of the prompt that the template writes before any content: not more than the answer has of them.
    texts = (before, marked, until)
    apart = (at for at, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1)
    shared = next(apart, min(map(len, texts)))
    return shared if until.startswith(plain) and len(plain) <= shared else None


def finds_answers(render: Render) -> bool | None:
    """Says whether a template shows where an answer begins; None for a template that takes no plain conversation."""
    rendered = False
    for said in (str, lambda text: [{"type": "text", "text": text}]):
        messages = [{"role": "user", "content": said("a")}, {"role": "assistant", "content": said("b")}]
        try:
            _, spans = answers_of(messages, render)
        except Exception:  # a template may ask for other messages
            spans = None
        if spans:
            return True
        rendered |= spans is not None
    return False if rendered else None
