"""task.checkpoint: every fault of a model directory gives a message of one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from offsite.errors import DataError, OffsiteError, UnsupportedModel
from offsite.task.checkpoint import load, load_tokenizer

WEIGHTS = "model.safetensors"


def config():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(**sizes, vocab_size=97, tie_word_embeddings=True)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(tmp_path)
    return tmp_path


def refused(folder, kind, reason, dtype=torch.float32):
    with pytest.raises(kind, match=reason) as caught:
        load(folder, dtype=dtype, kind="causal_lm")
    assert isinstance(caught.value, OffsiteError)
    assert "\n" not in str(caught.value)


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_good_directory_loads_in_the_dtype_asked(folder, dtype):
    model = load(folder, dtype=dtype, kind="causal_lm")
    assert {p.dtype for p in model.parameters()} == {dtype}
    saved = load_file(folder / WEIGHTS)
    assert all(torch.equal(model.state_dict()[name], tensor.to(dtype)) for name, tensor in saved.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_sharded_weights_load(tmp_path):
    LlamaForCausalLM(config()).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    load(tmp_path, dtype=torch.float32, kind="causal_lm")


def test_a_missing_shard_is_refused(tmp_path):
    LlamaForCausalLM(config()).save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    refused(tmp_path, DataError, "cannot be read")


def test_a_missing_directory_is_refused(tmp_path):
    refused(tmp_path / "none", DataError, "is not a directory")


def test_a_hub_name_is_never_looked_up():
    refused("owner/some-model", DataError, "is not a directory")


def test_a_directory_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    refused(folder, DataError, r"no config\.json")


def test_a_damaged_config_is_refused(folder):
    (folder / "config.json").write_text("{")
    refused(folder, DataError, r"damaged config\.json")


def test_a_directory_without_weights_is_refused(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, DataError, r"no \*\.safetensors")


def test_weights_only_in_a_pickle_are_refused_unread(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never unpickled")
    refused(folder, DataError, r"in a pickle, pytorch_model\.bin; convert")


def test_truncated_weights_are_refused(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    refused(folder, DataError, "cannot be read")


def test_a_missing_tensor_is_refused_rather_than_made_up(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    refused(folder, DataError, "lacks tensor='model.layers.1.mlp.up_proj.weight'")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_no_number_is_refused(folder, value):
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 5] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    refused(folder, DataError, "q_proj.weight' holds NaN or Inf")


def test_a_weight_too_large_for_the_dtype_is_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    load(folder, dtype=torch.float32, kind="causal_lm")
    refused(folder, DataError, "holds NaN or Inf as torch.float16", torch.float16)


def test_a_weight_of_another_shape_is_refused(folder):
    change_config(folder, intermediate_size=64)
    refused(folder, DataError, "cannot be read")


def test_a_model_that_is_no_language_model_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(tmp_path)
    refused(tmp_path, UnsupportedModel, "model_type='vit'")


def test_a_masked_language_model_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(**sizes, vocab_size=97)).save_pretrained(tmp_path)
    refused(tmp_path, UnsupportedModel, "BertForMaskedLM")


def test_code_in_the_directory_is_never_run(folder):
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')")
    change_config(folder, model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    refused(folder, UnsupportedModel, "never run")
    change_config(folder, model_type="llama", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    assert type(load(folder, dtype=torch.float32, kind="causal_lm")) is LlamaForCausalLM


def test_a_quantised_model_is_refused(folder):
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, UnsupportedModel, "dequantised")


def test_a_missing_tokenizer_is_refused(folder):
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        load_tokenizer(folder)
    with pytest.raises(DataError, match="is not a directory"):
        load_tokenizer(folder / "none")


def test_a_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(folder)
