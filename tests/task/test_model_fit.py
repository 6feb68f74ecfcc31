"""task.model_fit against the models themselves: each runs at its number of positions, and fails one token further."""

import copy
import json
import logging

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM

from offsite.emulator.vetting.random_inputs import random_inputs
from offsite.errors import ConfigError, UnsupportedModel
from offsite.task.kinds import KINDS
from offsite.task.model_fit import (
    _empty,
    check_fit,
    check_positions,
    check_token_ids,
    most_positions,
    position_warning,
)
from offsite.task.tasks import TASKS

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2}
BART = {
    **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
}
ROTARY = {**GPT, "rotary_dim": 4}
# model type -> settings; all have 32 positions in their configuration
LEARNT = {
    "gpt2": {**GPT, "n_positions": 32},
    "gpt_bigcode": {**GPT, "n_positions": 32},
    "gpt_neo": {
        **{"hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
        "max_position_embeddings": 32,
    },
    "openai-gpt": {**GPT, "n_positions": 32},
    "gptj": {**ROTARY, "n_positions": 32},
    "codegen": {**{**ROTARY, "n_head": 4, "n_embd": 32}, "n_positions": 32},
    "ctrl": {**GPT, "dff": 24, "n_positions": 32},
    "mpt": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 32},
    "opt": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "biogpt": {**SIZES, "max_position_embeddings": 32},
    "bert": {**SIZES, "max_position_embeddings": 32},
    "electra": {**SIZES, "embedding_size": 16, "max_position_embeddings": 32},
    "albert": {**SIZES, "embedding_size": 16, "max_position_embeddings": 32},
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32},
    "nystromformer": {**SIZES, "num_landmarks": 32, "segment_means_seq_len": 32, "max_position_embeddings": 32},
    "roberta": {**SIZES, "max_position_embeddings": 34},
    "camembert": {**SIZES, "max_position_embeddings": 34},
    "xlm-roberta": {**SIZES, "max_position_embeddings": 34},
    "mpnet": {**SIZES, "max_position_embeddings": 34},
    "deberta": {**SIZES, "max_position_embeddings": 32, "position_biased_input": True},
    "bart": {**BART, "max_position_embeddings": 32},
    "mbart": {**BART, "max_position_embeddings": 32},
    "pegasus": {**BART, "max_position_embeddings": 32},
    "marian": {**BART, "max_position_embeddings": 32, "decoder_vocab_size": 40, "pad_token_id": 1},
    "led": {
        **BART,
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 32,
        "attention_window": 4,
    },
}
COMPUTED = {
    "llama": {**SIZES, "max_position_embeddings": 32},
    "mistral": {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 32, "sliding_window": 8},
    "gemma3_text": {
        **SIZES,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "sliding_window": 8,
    },
    "gpt_neox": {**SIZES, "max_position_embeddings": 32},
    "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "n_positions": 32},
    "m2m_100": {**BART, "max_position_embeddings": 32},
    "deberta-v2": {**SIZES, "max_position_embeddings": 32, "position_biased_input": False, "relative_attention": True},
    "modernbert": {**SIZES, "max_position_embeddings": 32, "pad_token_id": 1},
}


def made(name, settings):
    kind = transformers.CONFIG_MAPPING[name]
    torch.manual_seed(0)
    return AutoModel.from_config(kind(**{"vocab_size": 40, "pad_token_id": 1, **settings})).eval()


def run(model, length):
    ids = torch.full((1, length), 5)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=ids, **more)


@pytest.mark.parametrize("name", LEARNT)
def test_a_model_runs_at_its_number_of_positions_and_fails_one_token_further(name):
    model = made(name, LEARNT[name])
    assert most_positions(model) == most_positions(_empty(model.config, "encoder")) == 32
    run(model, 32)
    with pytest.raises((IndexError, RuntimeError)):
        run(model, 33)
    check_positions(32, 32)
    with pytest.raises(ConfigError, match=r"length=33: must be at most 32, the number of the model's positions; 32 is"):
        check_positions(most_positions(model), 33)


@pytest.mark.parametrize("name", ["gpt2", "roberta", "bart"])
def test_the_random_inputs_of_a_vetting_fit_short_tables(name):
    """RoBERTa has two positions fewer than its configuration says."""
    settings = {key: 20 if value in (32, 34) else value for key, value in LEARNT[name].items()}
    model = made(name, settings)
    inputs = random_inputs(model, torch.Generator().manual_seed(1))
    assert inputs["input_ids"].shape[1] == most_positions(model) == (18 if name == "roberta" else 20)
    model(**inputs)


@pytest.mark.parametrize("name", COMPUTED)
def test_a_model_that_computes_its_positions_has_no_bound(name):
    """The length is only warned about, where the configuration states for how many the model was made."""
    model = made(name, COMPUTED[name])
    assert most_positions(model) is None
    run(model, 48)
    stated = "max_position_embeddings" in COMPUTED[name]
    assert position_warning(model.config, 32) == ""  # also with a sliding window of 8
    assert ("length=48: the model was made for at most 32" in position_warning(model.config, 48)) == stated


def test_extended_rotary_positions_are_not_warned_about():
    base = {**SIZES, "vocab_size": 40}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    config = transformers.LlamaConfig(**base, max_position_embeddings=32, rope_parameters=yarn)
    assert position_warning(config, 128) == ""
    assert "at most 128 positions" in position_warning(config, 129)
    stretched = {
        **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 1e4},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    }
    config = transformers.LlamaConfig(**base, max_position_embeddings=256, rope_parameters=stretched)
    assert position_warning(config, 256) == ""
    assert "at most 256 positions" in position_warning(config, 257)


def test_the_positions_of_an_image_do_not_count_for_the_text():
    text = transformers.LlamaConfig(**SIZES, vocab_size=40, max_position_embeddings=32)
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=39)
    model = AutoModel.from_config(config)
    assert sum("position_embedding" in name for name, _ in model.named_parameters()) == 1  # of 5 places
    assert most_positions(model) is None
    assert most_positions(_empty(config, "image_text")) is None


def test_an_id_without_a_row_is_refused_by_its_number():
    config = transformers.BertConfig(**SIZES, vocab_size=40, pad_token_id=0)
    check_token_ids(config, 39, "sequence_classification")
    check_token_ids(config, None)
    with pytest.raises(UnsupportedModel, match=r"token id=40: the model has rows for the token ids 0 to 39 only"):
        check_token_ids(config, 40)
    for key, number, kind in (
        ("pad_token_id", 40, "causal_lm"),
        ("pad_token_id", -1, "token_classification"),
        ("pad_token_id", None, "seq2seq"),
        ("decoder_start_token_id", 40, "seq2seq"),
    ):
        other = copy.deepcopy(config)
        other.decoder_start_token_id = 2
        setattr(other, key, number)
        with pytest.raises(UnsupportedModel, match=rf"{key}={number}: must be a token id of the model, from 0 to 39"):
            check_token_ids(other, 39, kind)
    other = copy.deepcopy(config)
    other.pad_token_id = -1  # many a Llama has this number, and no text of it is padded with a token
    check_token_ids(other, 39, "causal_lm")


class Words:
    largest_id = 39


def test_a_folder_is_checked_before_its_weights_are_loaded(tmp_path, caplog):
    config = transformers.GPT2Config(**GPT, vocab_size=40, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    task = TASKS["causal_lm"]
    with caplog.at_level(logging.INFO):
        assert check_fit(task, tmp_path, 32, Words()) == []
        with pytest.raises(ConfigError, match="length=33: must be at most 32"):
            check_fit(task, tmp_path, 33, Words())
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"vocab_size": 39, "pad_token_id": None}))
    with pytest.raises(UnsupportedModel, match="token id=39"):
        check_fit(task, tmp_path, 32, Words())
    assert set(KINDS) >= {task.kind for task in TASKS.values()} - {"diffusion"}
