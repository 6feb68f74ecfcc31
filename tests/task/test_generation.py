"""Generated texts against transformers' own way from a text to a text, for each kind of model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from transformers import AutoTokenizer, GenerationConfig

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.adapter.methods.soft_prompt import SoftPrompt
from offsite.adapter.spec import AdapterSpec
from offsite.errors import UnsupportedModel
from offsite.task.chat import ANSWER, PLAIN
from offsite.task.generation import Prompt, end_of_answer, generate
from offsite.task.tasks import TASKS
from offsite.task.tokenizer import Tokenizer
from tests.task.tokenizers_made import BOS, CODED, TEXTS, byte_level, pieces, saved, word_pieces
from tests.task_samples import SAMPLES, Sample, first_of, seeded

NEW, SPREAD = 7, 2.0
# Each of these would give other texts; the last four make transformers sample.
UNWANTED = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "min_new_tokens": 5, "num_beams": 3}
UNWANTED |= {"do_sample": True, "temperature": 9.0, "top_k": 5, "num_return_sequences": 2}


def named(name: str) -> Sample:
    return next(sample for sample in SAMPLES if str(sample) == name)


def opened(sample: Sample, folder: Path) -> tuple[Any, Any, Any]:
    """Returns task, model and processor of a folder whose own settings ask for sampling."""
    sample.save(folder, seed=3)
    (folder / "generation_config.json").write_text(GenerationConfig(**UNWANTED).to_json_string())
    task = TASKS[sample.task]
    model = task.load(folder, dtype=torch.float32)
    assert model.generation_config.do_sample
    with torch.no_grad(), seeded(4):
        for module in model.modules():  # so that texts differ, and do not repeat the token of a tied head
            if isinstance(module, torch.nn.Linear) and module.weight is not model.get_input_embeddings().weight:
                module.weight.add_(SPREAD * torch.randn(module.weight.shape))
    return task, model, task.load_processor(folder)


def written(model: Any, processor: Any, prompts: Sequence[Prompt | None], cache: bool = True) -> list[str]:
    """Returns our texts; every record has a prompt."""
    words = getattr(processor, "words", processor)
    ids = []
    for prompt in prompts:
        assert prompt is not None
        ids.append(generate(model, prompt, new_tokens=NEW, end=words.eos_token_id, cache=cache)[0])
    return list(words.texts(ids))


def theirs(model: Any, folder: Path, texts: list[str], **settings: Any) -> list[str]:
    """Returns the texts of transformers alone: its tokenizer, a padded batch, and its decoding."""
    side = "right" if model.config.is_encoder_decoder else "left"
    words = AutoTokenizer.from_pretrained(str(folder), padding_side=side)
    inputs = words(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    end = words.eos_token_id
    model.generation_config = GenerationConfig(pad_token_id=words.pad_token_id, eos_token_id=end)
    ids = model.generate(**inputs, do_sample=False, **({"max_new_tokens": NEW} | settings))
    begin = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return list(words.batch_decode(ids[:, begin:], skip_special_tokens=True))


def test_a_decoder_goes_on_behind_its_prompt(tmp_path: Path) -> None:
    sample = named("prompt_completion-llama")
    task, model, processor = opened(sample, tmp_path)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    records = sample.records(12, 5)
    prompts = task.prompts(processor, records, length=sample.length, model_config=model.config)
    ours = written(model, processor, prompts)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config.do_sample
    assert ours == written(model, processor, prompts)
    assert len(set(ours)) > 6
    assert ours == theirs(model.eval(), tmp_path, [record["prompt"] for record in records])
    assert [prompt.text for prompt in prompts] == [record["completion"] for record in records]


def test_a_conversation_is_asked_through_its_template(tmp_path: Path) -> None:
    sample = first_of("chat")
    task, model, processor = opened(sample, tmp_path)
    records = sample.records(8, 5)
    records[0]["messages"][-1]["weight"] = 0 if len(records[0]["messages"]) > 2 else 1
    records[1]["messages"].append({"role": "user", "content": "w1"})
    prompts = task.prompts(processor, records, length=sample.length, model_config=model.config)
    words = AutoTokenizer.from_pretrained(str(tmp_path))
    places = [max(at for at, one in enumerate(record["messages"]) if one["role"] == "assistant") for record in records]
    if len(records[0]["messages"]) > 2:
        places[0] = 1
    asked = [
        words.apply_chat_template(record["messages"][:at], tokenize=False, add_generation_prompt=True)
        for record, at in zip(records, places, strict=True)
    ]
    assert all(text.endswith("<s>assistant ") for text in asked)
    assert {len(record["messages"]) for record in records} >= {2, 4}
    assert written(model, processor, prompts) == theirs(model, tmp_path, asked)
    assert [p.text for p in prompts] == [r["messages"][at]["content"] for r, at in zip(records, places, strict=True)]


@pytest.mark.parametrize(
    ("name", "begin", "settings"),
    [
        ("seq2seq-t5", ["<pad>"], {}),
        # BART's targets begin with <s>, which its published models force as the first token.
        ("seq2seq-bart", ["</s>", "<s>"], {"forced_bos_token_id": "<s>"}),
        ("MBartTokenizer", ["de_DE"], {"decoder_start_token_id": "de_DE"}),
        ("MBart50Tokenizer", ["</s>", "de_DE"], {"forced_bos_token_id": "de_DE", "decoder_start_token_id": "</s>"}),
        ("NllbTokenizer", ["</s>", "deu_Latn"], {"forced_bos_token_id": "deu_Latn"}),
    ],
)
def test_a_decoder_begins_as_its_family_does(
    tmp_path: Path, name: str, begin: list[str], settings: dict[str, str]
) -> None:
    sample = named(name) if name not in CODED else coded(name, tmp_path)
    task, model, processor = opened(sample, tmp_path)
    words = AutoTokenizer.from_pretrained(str(tmp_path))
    number = words.convert_tokens_to_ids
    records = sample.records(12, 5)
    prompts = task.prompts(processor, records, length=sample.length, model_config=model.config)
    assert [prompt.inputs["decoder_input_ids"].tolist() for prompt in prompts] == [[number(begin)]] * len(prompts)
    ours = written(model, processor, prompts)
    assert len(set(ours)) > 1
    forced = {key: number(token) for key, token in settings.items()}
    start, more = {"decoder_start_token_id": number(begin[0])}, len(begin) - 1
    texts = [record["source"] for record in records]
    assert ours == theirs(model, tmp_path, texts, **(start | forced), max_new_tokens=NEW + more)


def coded(name: str, folder: Path) -> Sample:
    """Returns an encoder-decoder whose tokenizer writes codes of languages."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 60}
    CODED[name](folder)
    words = AutoTokenizer.from_pretrained(str(folder))
    ids = {"vocab_size": len(words), "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    ids |= {"decoder_start_token_id": words.eos_token_id}
    kind, made = (
        (hf.M2M100Config, hf.M2M100ForConditionalGeneration)
        if name == "NllbTokenizer"
        else (hf.MBartConfig, hf.MBartForConditionalGeneration)
    )
    pairs = [{"source": f"{one} mill {two}", "target": two} for one in ("river", "a old", "by the") for two in "runs"]
    return Sample("seq2seq", name, lambda: made(kind(**sizes, **ids)), CODED[name], lambda count, seed: pairs, 24, ())


def by_hand(model: Any, prompt: Prompt) -> list[int]:
    """Returns the likeliest tokens, each by a pass over all tokens before it."""
    inputs, key = dict(prompt.inputs), "decoder_input_ids" if "decoder_input_ids" in prompt.inputs else "input_ids"
    with torch.no_grad():
        for _ in range(NEW):
            best = model(**inputs, use_cache=False).logits[:, -1].argmax(dim=1, keepdim=True)
            inputs[key] = torch.cat([inputs[key], best], dim=1)
            if key == "input_ids":
                inputs["attention_mask"] = torch.ones_like(inputs[key])
    return inputs[key][0, prompt.begin :].tolist()


def without_ends(model: Any) -> None:
    for settings in (model.generation_config, model.config, model.config.get_text_config()):
        settings.eos_token_id = None


@pytest.mark.parametrize("name", ["prompt_completion-llama", "image_text-llava", "seq2seq-t5"])
def test_each_token_is_the_likeliest(tmp_path: Path, name: str) -> None:
    sample = named(name)
    task, model, processor = opened(sample, tmp_path)
    without_ends(model)
    prompts = task.prompts(processor, sample.records(6, 5), length=sample.length, model_config=model.config)
    for prompt in prompts:
        bare = replace(prompt, ends=frozenset())
        expected = by_hand(model, bare)
        for cache in (True, False):
            assert generate(model, bare, new_tokens=NEW, end=None, cache=cache) == (expected, False)


def test_an_image_is_seen(tmp_path: Path) -> None:
    """The same question about two images has other logits, and its prompt is the whole conversation's beginning."""
    sample = first_of("image_text")
    task, model, processor = opened(sample, tmp_path)
    records = sample.records(6, 5)
    prompts = task.prompts(processor, records, length=sample.length, model_config=model.config)
    batch = task.encode(processor, records, length=sample.length, split="truncate", model_config=model.config)
    for row, prompt in enumerate(prompts):
        size = int(batch.text.answers[row].argmax())
        assert prompt.inputs["input_ids"][0].tolist() == batch.text.input_ids[row, :size].tolist()
        assert torch.equal(prompt.inputs["pixel_values"], batch.pixels.select([row]).scaled(torch.float32))
    assert {prompt.text for prompt in prompts} == {record["answer"] for record in records}
    assert all(prompt.ends == {1} for prompt in prompts)


@pytest.mark.parametrize("method", ["lora", "soft_prompt"])
def test_an_adapter_works_in_generated_texts(tmp_path: Path, method: str) -> None:
    """Soft prompts generate without a cache, as `coordinator.job.generated` has it; with one they refuse."""
    sample = named("prompt_completion-llama")
    task, model, processor = opened(sample, tmp_path)
    without_ends(model)
    prompts = task.prompts(processor, sample.records(6, 5), length=sample.length, model_config=model.config)
    plain = [by_hand(model, prompt) for prompt in prompts]
    targets = ("v_proj", "o_proj") if method == "lora" else ()
    spec = AdapterSpec(method, 4, 8.0, targets, ("model.layers.0", "model.layers.5"), 0, ())
    model = attach(model, spec)
    layout = Layout.of(model)
    layout.write(model, np.random.default_rng(0).normal(0, 1, layout.size).astype(np.float32))
    cache = not any(isinstance(module, SoftPrompt) for module in model.modules())
    assert cache == (method == "lora")
    expected = [by_hand(model, prompt) for prompt in prompts]
    assert expected != plain
    assert [generate(model, p, new_tokens=NEW, end=None, cache=cache)[0] for p in prompts] == expected
    if not cache:
        with pytest.raises(UnsupportedModel, match="use_cache"):
            generate(model, prompts[0], new_tokens=NEW, end=None, cache=True)


def test_a_text_ends_at_every_end_that_somebody_set(tmp_path: Path) -> None:
    sample = named("prompt_completion-llama")
    task, model, processor = opened(sample, tmp_path)
    without_ends(model)
    (prompt,) = task.prompts(processor, sample.records(1, 5), length=sample.length, model_config=model.config)
    ids, ended = generate(model, prompt, new_tokens=NEW, end=None, cache=True)
    assert (len(ids), ended) == (NEW, False)
    last = ids[-1]
    expected = (ids[: ids.index(last)], True)
    assert generate(model, prompt, new_tokens=NEW, end=last, cache=True) == expected
    assert generate(model, replace(prompt, ends=frozenset({last})), new_tokens=NEW, end=None, cache=True) == expected
    for settings in (model.generation_config, model.config):
        settings.eos_token_id = [0, last]
        assert generate(model, prompt, new_tokens=NEW, end=None, cache=True) == expected
        settings.eos_token_id = None


def test_a_record_without_a_prompt_or_a_right_text_is_left_out(tmp_path: Path) -> None:
    sample = named("prompt_completion-llama")
    task, model, processor = opened(sample, tmp_path)
    facts = {"length": sample.length, "model_config": model.config}
    pairs = [("w1 " * 40, "w2"), ("", "w1"), ("w1", " ")]
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    assert task.prompts(processor, records, **facts) == [None, None, None]
    chat = first_of("chat")
    task, model, processor = opened(chat, tmp_path)
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}] * 12
    (prompt,) = task.prompts(processor, [{"messages": talk}], length=chat.length, model_config=model.config)
    assert prompt.begin <= chat.length < 2 * len(talk) * 2  # the last answer that has room
    called = [talk[0], {"role": "assistant", "content": [{"type": "text", "text": ""}]}]
    assert task.prompts(processor, [{"messages": called}], length=64, model_config=model.config) == [None]


@pytest.mark.parametrize(
    "save", [saved(byte_level), saved(lambda: pieces(BOS)), saved(word_pieces), saved(lambda: byte_level(rule=BOS))]
)
def test_ids_become_the_text_that_transformers_makes_of_them(tmp_path: Path, save: Any) -> None:
    save(tmp_path)
    ours, words = Tokenizer.of(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    rows = [words(text)["input_ids"] for text in TEXTS]
    rows += [[*row[::-1], 0, 1, 2, 3] for row in rows] + [[number] for number in range(60)]
    assert ours.texts(rows) == words.batch_decode(rows, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("behind", "token"),
    [("</s>", "</s>"), ("<mask>\n", "<mask>"), ("\n\n", None), ("", None), ("<mask> river", None)],
)
def test_the_token_that_ends_an_answer_is_found_in_the_template(tmp_path: Path, behind: str, token: str | None) -> None:
    saved(byte_level)(tmp_path)
    answer = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + behind + "{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(answer + "{% if add_generation_prompt %}assistant: {% endif %}")
    number = AutoTokenizer.from_pretrained(str(tmp_path)).convert_tokens_to_ids(token) if token else None
    assert end_of_answer(Tokenizer.of(tmp_path), PLAIN, ANSWER) == ({number} if token else set())
