"""Why records have nothing to learn from: each reason on a record that has it, with a real tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from offsite.task.nothing_to_learn import Encoder, Learnt, learnt
from offsite.task.readers.columns import columns_of
from offsite.task.readers.tables import read, read_for_job
from offsite.task.tasks import TASKS

REFUSING = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m['content'] }} {% endfor %}"
)


def encoder(fed: Path, task: str, length: int = 8, model: Path | None = None, split: str = "truncate") -> Encoder:
    folder = model or fed.parent / "model"
    config = AutoConfig.from_pretrained(folder)
    return Encoder(TASKS[task], TASKS[task].load_processor(folder), length, split, config)


def outcome_of(encoder: Encoder, folder: Path, lines: list[Any], *, lenient: bool = False) -> Learnt:
    """Writes records, reads them with the product's reader, and returns what can be learnt from them."""
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = columns_of(encoder.task.columns, names={})
    reader = read_for_job if lenient else read
    records = reader(path, reader=None, columns=columns)
    return learnt(encoder, records, encoder.targets(records))


def test_a_prompt_that_fills_the_example(fed: Path, tmp_path: Path) -> None:
    long, short = {"prompt": "w1 " * 20, "completion": "w2"}, {"prompt": "w1", "completion": "w2"}
    outcome = outcome_of(encoder(fed, "prompt_completion"), tmp_path, [short, long, long])
    assert (outcome.records, outcome.left_out) == (3, 2)
    assert outcome.first.startswith(
        f"data='{tmp_path / 'data.jsonl'}' line=2: its first 8 tokens hold nothing to learn"
    )
    assert "with data.length = 32" in outcome.first  # 20 tokens of the prompt do not leave a place in 16
    assert not outcome.nothing


@pytest.mark.parametrize(
    ("text", "expected"),
    [("w1", "it makes 1 token, and 2 are the fewest"), ("   ", "it is blank")],
)
def test_a_text_of_too_few_tokens(fed: Path, tmp_path: Path, text: str, expected: str) -> None:
    lines = [{"text": "w1 w2 w3"}] * 3 + [{"text": text}]
    outcome = outcome_of(encoder(fed, "causal_lm"), tmp_path, lines)
    assert outcome.left_out == 1
    assert "line=4: " in outcome.first
    assert expected in outcome.first


def test_a_template_that_refuses_every_conversation(fed: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((fed.parent / "model" / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(REFUSING)
    talk = [{"role": "system", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    outcome = outcome_of(encoder(fed, "chat", model=tmp_path), tmp_path, [{"messages": talk}] * 60)
    assert outcome.nothing
    assert str(outcome).startswith("60 of 60 records came to nothing; the first because data=")
    assert "line=1: the model's chat template fails on it" in str(outcome)


def test_a_broken_row_gives_the_readers_own_rule(fed: Path, tmp_path: Path) -> None:
    lines = [{"text": 7}, {"text": "w1 w2"}, {"prompt": "w1"}]
    outcome = outcome_of(encoder(fed, "causal_lm"), tmp_path, lines, lenient=True)
    assert outcome.left_out == 2
    assert "line=1 column='text' holds int, not text" in outcome.first


def test_blocks_are_counted_by_their_texts(fed: Path, tmp_path: Path) -> None:
    made = encoder(fed, "causal_lm", split="blocks")
    assert outcome_of(made, tmp_path, [{"text": "w1 w2 w3"}, {"text": "w1"}]).left_out == 0
    assert outcome_of(made, tmp_path, [{"text": "w1 w2 w3"}] * 3).targets == 3 * 3  # with the end-of-text token


def test_half_a_character_costs_no_record(fed: Path, tmp_path: Path) -> None:
    """JSON's lone surrogate becomes U+FFFD, and the offsets of an answer stay."""
    made = encoder(fed, "causal_lm")
    path = tmp_path / "half.jsonl"
    path.write_text('{"text": "w1 \\ud83d w2"}\n{"text": "w1 \\ud83d\\ude00 w2"}\n')
    records = read(path, reader=None, columns=columns_of(made.task.columns, names={}))
    assert [record["text"] for record in records] == ["w1 \ufffd w2", "w1 \U0001f600 w2"]
    assert learnt(made, records, made.targets(records)).left_out == 0
    nested = tmp_path / "nested.jsonl"
    nested.write_text('{"messages": [{"role": "user", "content": "\\udc00x"}]}\n')
    (record,) = read(nested, reader=None, columns=columns_of(TASKS["chat"].columns, names={}))
    assert record["messages"][0]["content"] == "\ufffdx"


def test_a_row_nested_without_end_is_a_fault_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text('{"messages": ' + "[" * 900 + "]" * 900 + '}\n{"messages": [{"role": "user", "content": "x"}]}\n')
    records = read_for_job(path, reader=None, columns=columns_of(TASKS["chat"].columns, names={}))
    assert len(records) == 2
