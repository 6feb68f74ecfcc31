"""Only the answers of prompts and conversations are learnt: against transformers' templates, and by hand."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from offsite.errors import ConfigError, DataError
from offsite.task.causal_lm import CausalLM
from offsite.task.examples import Examples
from offsite.task.records import Row
from offsite.task.tasks import TASKS
from offsite.task.tokenizer import Tokenizer
from tests.task_samples import TEMPLATE, first_of, words_tokenizer

CHAT, COMPLETION = TASKS["chat"], TASKS["prompt_completion"]
# Like many published templates: a system prompt, trimmed contents, and marks around generated text.
LONG = """{%- if messages[0]['role'] == 'system' -%}{%- set rest = messages[1:] -%}<s>{{ messages[0]['content'] }}</s>
{%- else -%}{%- set rest = messages -%}{%- endif -%}
{%- for m in rest -%}
{%- if m['role'] not in ['user', 'assistant'] -%}{{ raise_exception('roles') }}{%- endif -%}
<s>{{ m['role'] }} {% if m.role == 'assistant' %}{% generation %}{{ m['content'] | trim }}</s>{% endgeneration %}
{%- else -%}{{ m['content'] | trim }}</s>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<s>assistant {% endif -%}"""
# Strips the thoughts from earlier answers of the assistant.
STRIPPING = (
    "{% for m in messages %}<s>{{ m['role'] }} {% if m.role == 'assistant' and not loop.last %}"
    "{{ m['content'].split('w59')[-1] }}{% else %}{{ m['content'] }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def tokenizer(folder, template=TEMPLATE):
    folder.mkdir(exist_ok=True)
    words_tokenizer(template=template)(folder)
    return Tokenizer.of(folder)


def talk(*contents, system=""):
    roles = ("user", "assistant") * len(contents)
    said = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *said] if system else said


def encode(task, words, records, length=32):
    return task.encode(words, records, length=length, split="truncate", model_config=None)


TALKS = [
    talk("w1 w2", "w3"),
    talk("w1", "w2 w3 w4", "w5", "w6"),
    talk("w1 w2", "w3", system="w7 w8"),
    talk(" w1  w2 ", " w3 w4 "),
]


def test_tokens_and_answers_are_those_of_transformers(tmp_path):
    """transformers' mask of the assistant's tokens comes from marks in the template, and ours from prefixes."""
    words, theirs = tokenizer(tmp_path, LONG), AutoTokenizer.from_pretrained(str(tmp_path))
    batch = encode(CHAT, words, [{"messages": one} for one in TALKS])
    for row, messages in enumerate(TALKS):
        expected = theirs.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        width = len(expected["input_ids"])
        assert batch.input_ids[row, :width].tolist() == expected["input_ids"]
        assert int(batch.attention_mask[row].sum()) == width
        assert batch.answers[row, :width].tolist() == expected["assistant_masks"]


def test_only_answers_are_scored(tmp_path):
    """The loss is the mean of the losses of the answers' tokens, from all logits."""
    sample = first_of("chat")
    model = CHAT.load(sample.save(tmp_path), dtype=torch.float32)
    batch = encode(CHAT, CHAT.load_processor(tmp_path), sample.records(4, 2), length=sample.length)
    logs = model(input_ids=batch.input_ids).logits.log_softmax(-1)
    for row in range(4):
        places = [
            at for at in range(1, batch.input_ids.shape[1]) if batch.answers[row, at] and batch.attention_mask[row, at]
        ]
        losses = [-logs[row, at - 1, batch.input_ids[row, at]] for at in places]
        assert int(batch.targets[row]) == len(places) > 0
        for task in (CHAT, CausalLM(chunk=None)):
            found = task.losses(model, batch.select([row]))[0]
            assert float(found) == pytest.approx(float(sum(losses) / len(losses)), rel=1e-5)


def test_an_answer_that_the_template_rewrites_later_is_no_target(tmp_path):
    words = tokenizer(tmp_path, STRIPPING)
    kept = talk("w1", "w2 w3", "w4", "w5")
    stripped = talk("w1", "w2 w59 w3", "w4", "w5")
    batch = encode(CHAT, words, [{"messages": kept}, {"messages": stripped}])
    # <s> user w1 </s> <s> assistant w2 w3 </s> <s> user w4 </s> <s> assistant w5 </s>
    assert batch.answers[0].nonzero().flatten().tolist() == [6, 7, 8, 15, 16]
    assert batch.answers[1].nonzero().flatten().tolist() == [14, 15]


def test_a_folder_without_template_takes_no_conversations(tmp_path):
    with pytest.raises(DataError, match=r"no chat template; add chat_template\.jinja"):
        encode(CHAT, tokenizer(tmp_path, None), [{"messages": TALKS[0]}])


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_template_is_found_where_transformers_keeps_it(tmp_path, place):
    tokenizer(tmp_path, None)
    if place.endswith("jinja"):
        (tmp_path / place).write_text(TEMPLATE)
    else:
        settings = json.loads((tmp_path / place).read_text())
        (tmp_path / place).write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    assert encode(CHAT, Tokenizer.of(tmp_path), [{"messages": TALKS[0]}]).targets.tolist() == [2]


HOSTILE = [
    "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{% include '/etc/passwd' %}",
    "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{% set _ = messages.append(1) %}w1",
    "{{ raise_exception(messages[0].content) }}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_a_template_that_does_harm_makes_nothing_of_a_record(tmp_path, template, monkeypatch):
    monkeypatch.setattr("offsite.task.tokenizer_worker.CPU_SECONDS", 2)
    words = tokenizer(
        tmp_path, "{% if 'w13' in messages[0].content %}" + template + "{% else %}" + TEMPLATE + "{% endif %}"
    )
    records = [{"messages": talk(content, "w3")} for content in ("w1", "w13", "w1")]
    assert encode(CHAT, words, records).targets.tolist() == [2, 0, 2]


def test_a_template_that_is_none_is_one_line(tmp_path, capfd):
    with pytest.raises(DataError, match=r"tokenizer.json or its chat template cannot be read"):
        tokenizer(tmp_path, "{% if %}")
    assert capfd.readouterr().err == ""


SECRET = "a private sentence"
BAD = [
    ([], "must be a list of {role, content}"),
    ([SECRET], "must be a list of {role, content}"),
    ([{"role": "user", "content": [SECRET]}], "must be a list of {role, content}"),
    ([{"role": "user"}], "must be a list of {role, content}"),
    ([{"role": "user", "content": SECRET}], "must have a message with role 'assistant'"),
]


@pytest.mark.parametrize(("messages", "rule"), BAD)
def test_what_is_no_conversation_is_named_by_its_place_and_never_shown(tmp_path, messages, rule):
    words = tokenizer(tmp_path)
    with pytest.raises(DataError, match=rf"^line=9 field='messages': {rule}") as caught:
        encode(CHAT, words, [{"messages": TALKS[0]}, Row({"messages": messages}, "line=9")])
    assert SECRET not in str(caught.value)


def test_a_completion_is_learnt_with_its_end_and_its_prompt_is_not(tmp_path):
    words = tokenizer(tmp_path, None)
    records = [
        {"prompt": "w1 w2", "completion": "w3 w4"},
        {"prompt": "w1 w2 w3", "completion": "w4 w5 w6 w7"},
        {"prompt": "w1 w2 w3 w4 w5 w6", "completion": "w7"},
        {"prompt": "", "completion": "w1 w2"},
    ]
    batch = encode(COMPLETION, words, records, length=6)
    number = {f"w{i}": 4 + i for i in range(10)}
    assert batch.input_ids[0].tolist() == [number["w1"], number["w2"], number["w3"], number["w4"], 3, 0]
    assert batch.predicted.tolist() == [
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
        [0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],  # no token precedes the first token
    ]
    assert batch.targets.tolist() == [3, 3, 0, 2]


def test_all_answers_are_the_plain_task(tmp_path):
    """If all tokens are answers, the losses equal those of language modelling to the last bit."""
    sample = first_of("causal_lm")
    task = TASKS["causal_lm"]
    model = task.load(sample.save(tmp_path), dtype=torch.float32)
    plain = encode(task, task.load_processor(tmp_path), sample.records(5, 1), length=16)
    marked = Examples(plain.input_ids, plain.attention_mask, torch.ones_like(plain.input_ids))
    assert torch.equal(task.losses(model, plain), task.losses(model, marked))
    assert task.tally(model, plain) == task.tally(model, marked)


@pytest.mark.parametrize("task", [CHAT, COMPLETION])
def test_their_records_are_not_joined(task, tmp_path):
    records = first_of(task.name).records(2, 1)
    with pytest.raises(ConfigError, match=r"split='blocks': .*write split = 'truncate'"):
        task.encode(tokenizer(tmp_path), records, length=16, split="blocks", model_config=None)


def test_answers_of_another_shape_are_refused():
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(DataError, match="answers shape"):
        Examples(ids, ids, torch.ones(2, 2, dtype=torch.long))
