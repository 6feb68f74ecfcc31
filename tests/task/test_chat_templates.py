"""Chat templates: rendered as transformers renders them, found where transformers finds them, answers found in them."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from offsite.emulator.package import package_folder
from offsite.errors import DataError
from offsite.task.chat_template import renderer
from offsite.task.records import LenientRecords, Row
from offsite.task.tasks import TASKS
from offsite.task.tokenizer import Tokenizer
from offsite.task.tokenizer_settings import TokenizerSettings
from tests.task.tokenizers_made import BOS, byte_level, change, saved

CHAT = TASKS["chat"]
BODY = (
    "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}{{ m.content }}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}!{{ call.function | tojson }}{% endfor %}{% endif %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "river", "arguments": {"unit": "m³", "deep": True, "at": None}}}
TOOLS: list[dict[str, Any]] = [
    {"role": "system", "content": "the <mill>"},
    {"role": "user", "content": "how deep?", "name": "anna"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning": "look"},
    {"role": "tool", "content": "3", "tool_call_id": "7"},
    {"role": "assistant", "content": "3 m", "tool_calls": None, "weight": 1},
]
FORMS = {
    "calls": BODY,
    "tools": "{% if tools is none and documents is none %}n{% endif %}{% if tools is defined %}d{% endif %}" + BODY,
    "missing keys": BODY + "{% for m in messages %}{{ m.keys() | list | length }}{{ 'tool_calls' in m }}{% endfor %}",
    "thoughts": BODY
    + "{% for m in messages %}{{ m.reasoning_content }},{{ m.thinking }},{{ m.reasoning }};{% endfor %}",
    "json": BODY + "{{ messages | tojson(indent=2) }}{{ messages[2] | tojson(sort_keys=true, ensure_ascii=true) }}",
    "tokens": "{{ bos_token }}{{ pad_token }}{{ unk_token }}{{ sep_token }}" + BODY,
    "loops": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.name }}{% endfor %}" + BODY,
    "memory": "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + 1 %}{% endfor %}{{ s.n }}" + BODY,
    "names": BODY + "{% for m in messages %}{{ m.get('name', '-') }}{{ m.tool_call_id }}{{ dict(a=1) }}{% endfor %}",
    "date": "{{ strftime_now('%d %b %Y') }}" + BODY,
}


class NewYear(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return datetime.datetime(2026, 1, 1)


def folder_with(folder: Path, template: str | None) -> Path:
    saved(byte_level)(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def encode(folder: Path, *talks: list[dict[str, Any]], length: int = 900) -> Any:
    records = [Row({"messages": talk}, f"line={line}") for line, talk in enumerate(talks, 1)]
    return CHAT.encode(Tokenizer.of(folder), records, length=length, split="truncate", model_config=None)


def learnt(folder: Path, *talks: list[dict[str, Any]]) -> list[str]:
    """Returns the text of each conversation's learnt tokens."""
    batch, theirs = encode(folder, *talks), AutoTokenizer.from_pretrained(str(folder))
    return [theirs.decode(ids[flags.bool()]) for ids, flags in zip(batch.input_ids, batch.answers, strict=True)]


@pytest.mark.parametrize("form", FORMS)
def test_a_conversation_is_rendered_as_by_transformers(tmp_path: Path, form: str, monkeypatch: Any) -> None:
    folder = folder_with(tmp_path, FORMS[form])
    monkeypatch.setattr(chat_template_utils, "datetime", NewYear)
    theirs, tokens = AutoTokenizer.from_pretrained(str(folder)), TokenizerSettings.of(folder).tokens
    render = renderer(FORMS[form], tokens, "2026-01-01")
    for prompt in (False, True):
        expected = theirs.apply_chat_template(TOOLS, tokenize=False, add_generation_prompt=prompt)
        assert render(TOOLS, prompt=prompt) == expected


def test_ids_of_a_conversation_are_those_of_transformers(tmp_path: Path) -> None:
    """No beginning is added: a tokenizer's template writes the token itself."""
    saved(lambda: byte_level(rule=BOS))(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}" + BODY)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    expected = theirs.apply_chat_template(TOOLS, tokenize=True, return_dict=True)["input_ids"]
    ((found, _),) = Tokenizer.of(tmp_path).chats([TOOLS], 900)
    assert found == expected


def test_a_call_is_learnt_with_its_answer(tmp_path: Path) -> None:
    (found,) = learnt(folder_with(tmp_path, BODY), TOOLS)
    assert found == 'look!{"name": "river", "arguments": {"unit": "m³", "deep": true, "at": null}}</s>3 m</s>'


def test_a_message_of_weight_0_is_read_and_not_learnt(tmp_path: Path) -> None:
    talk = [{**message, "weight": 0} if "tool_calls" in message else message for message in TOOLS[:3]] + TOOLS[3:]
    found = encode(folder_with(tmp_path, BODY), [*TOOLS[:4], {**TOOLS[4], "weight": 0}], talk)
    whole = encode(tmp_path, TOOLS)
    assert found.input_ids[0].tolist() == found.input_ids[1].tolist() == whole.input_ids[0].tolist()
    assert learnt(tmp_path, [*TOOLS[:4], {**TOOLS[4], "weight": 0}])[0].endswith("}</s>")


BAD = {
    "unread": ({"tool_calls": [CALL]}, "an answer has tool_calls, which the model's chat template does not read"),
    "thoughts": ({"thinking": "look"}, "an answer has reasoning_content, which the model's chat template does not"),
    "function": ({"function_call": {"name": "x"}}, "an answer has function_call, which"),
    "weight": ({"weight": 0.5}, "must have weights of 0, not learnt, or 1"),
    "nothing": ({"weight": 0}, "must have a message with role 'assistant' to learn"),
    "bytes": ({"image": b"x"}, "must be a list of {role, content}"),
    "deep": ({"tool_calls": json.loads("[" * 400 + "]" * 400)}, "must be a list of {role, content}"),
    "empty": ({"content": None}, "must be a list of {role, content}"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_template_would_drop_is_refused(tmp_path: Path, name: str) -> None:
    """A dropped call would teach the model to end its answer at once."""
    keys, rule = BAD[name]
    folder = folder_with(tmp_path, BODY.replace("m.tool_calls", "m.calls").replace("reasoning_content", "thoughts"))
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=rf"^line=2 field='messages': {rule}"):
        encode(folder, good, [good[0], {**good[1], **keys}])
    records = LenientRecords([Row({"messages": talk}, "line") for talk in (good, [good[0], {**good[1], **keys}], good)])
    batch = CHAT.encode(Tokenizer.of(folder), records, length=64, split="truncate", model_config=None)
    assert [count > 0 for count in batch.targets.tolist()] == [True, False, True]
    assert len(records.faults) == 1


THINK = BODY.replace("<assistant>{% endif %}", "<assistant><think>\n{% endif %}")
PARTS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "how deep?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "3 m"}]},
]


@pytest.mark.parametrize("said", ["3 m", "<tab 3", "\n", "<think>\nlook\n</think>\n3 m"])
def test_an_answer_begins_where_the_prompt_and_the_answer_part(tmp_path: Path, said: str) -> None:
    """Templates of reasoning models open `<think>` in the prompt, and keep no thoughts in a conversation."""
    talk = [{"role": "user", "content": "how deep?"}, {"role": "assistant", "content": said}]
    folder = folder_with(tmp_path, THINK)
    expected = said.removeprefix("<think>\n") + "</s>"
    assert learnt(folder, talk) == [expected]
    assert learnt(folder, [*talk, *talk]) == [expected * 2]


def test_a_conversation_may_begin_with_an_answer(tmp_path: Path) -> None:
    """Many templates render no prompt without a message; the other answers are learnt all the same."""
    folder = folder_with(tmp_path, "{% set _ = messages[0]['role'] + '' %}" + BODY)
    talk = [
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "how deep?"},
        {"role": "assistant", "content": "3 m"},
    ]
    assert learnt(folder, talk) == ["3 m</s>"]


def test_contents_in_parts_are_passed_on(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, BODY.replace("m.content", "m.content[0].text"))
    assert learnt(folder, PARTS) == ["3 m</s>"]


@pytest.mark.parametrize("template", ["{{ messages | length }}" + BODY, "{{ messages[-1].role }}" + BODY])
def test_a_template_that_does_not_show_its_answers_is_named(tmp_path: Path, template: str) -> None:
    folder = folder_with(tmp_path, template)
    with pytest.raises(DataError, match=r"add_generation_prompt.*is not how the template begins an answer"):
        encode(folder, TOOLS)


def test_a_template_that_asks_for_the_date_is_told_one(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, FORMS["date"])
    with pytest.raises(DataError, match=r'asks for the date .*write "chat_template_date": "2026-12-01"'):
        encode(folder, TOOLS)
    change(folder, chat_template_date="today")
    with pytest.raises(DataError, match=r"chat_template_date='today' must be a date"):
        encode(folder, TOOLS)
    change(folder, chat_template_date="2026-02-03T10:00")
    same = encode(folder_with(tmp_path / "other", "03 Feb 2026" + BODY), TOOLS)
    assert encode(folder, TOOLS).input_ids.tolist() == same.input_ids.tolist()


RIGHT, WRONG = "right" + BODY, "wrong" + BODY
PLACES: dict[str, tuple[dict[str, str], Any]] = {
    "file": ({"chat_template.jinja": RIGHT}, None),
    "file before settings": ({"chat_template.jinja": RIGHT}, WRONG),
    "settings": ({}, RIGHT),
    "list": ({}, [{"name": "tool_use", "template": WRONG}, {"name": "default", "template": RIGHT}]),
    "files": ({"chat_template.jinja": RIGHT, "additional_chat_templates/rag.jinja": WRONG}, WRONG),
}


def lay(folder: Path, files: dict[str, str], setting: Any) -> Path:
    folder_with(folder, None)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    change(folder, chat_template=setting)
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_a_template_is_found_where_transformers_finds_it(tmp_path: Path, place: str) -> None:
    folder = lay(tmp_path, *PLACES[place])
    theirs = AutoTokenizer.from_pretrained(str(folder))
    assert theirs.get_chat_template() == Tokenizer.of(folder).template == RIGHT


def test_a_processor_s_file_holds_a_template_too(tmp_path: Path) -> None:
    """transformers' processors of images and texts look there first; a tokenizer's own template comes first else."""
    folder = lay(tmp_path, {"chat_template.json": json.dumps({"chat_template": RIGHT})}, None)
    assert Tokenizer.of(folder).template == RIGHT
    change(folder, chat_template=WRONG)
    assert Tokenizer.of(folder).template == WRONG
    assert Tokenizer.of(folder, with_images=True).template == RIGHT
    (tmp_path / "package").mkdir()
    package_folder.copy_tokenizer(folder, tmp_path / "package")
    assert Tokenizer.of(tmp_path / "package", with_images=True).template == RIGHT


@pytest.mark.parametrize("files", [{}, {"additional_chat_templates/rag.jinja": WRONG}])
def test_named_templates_without_a_default_are_named(tmp_path: Path, files: dict[str, str]) -> None:
    folder = lay(tmp_path, files, None if files else [{"name": "rag", "template": WRONG}])
    with pytest.raises(DataError, match=r"chat templates \['rag'\], but none is named 'default'"):
        encode(folder, TOOLS)
