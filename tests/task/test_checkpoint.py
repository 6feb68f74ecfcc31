"""task.checkpoint: every fault of a model directory gives a message of one line."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from offsite.emulator.calibration.source import ShardSource
from offsite.errors import DataError, OffsiteError, UnsupportedModel
from offsite.task.checkpoint import load, load_tokenizer
from offsite.task.model_folder import beside

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
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    first.unlink()
    refused(tmp_path, DataError, rf"file='{first.name}' is not there, and model.safetensors.index.json names it")


@pytest.mark.parametrize("fault", ["cut", "pointer"])
def test_the_one_bad_shard_is_named(tmp_path, fault):
    LlamaForCausalLM(config()).save_pretrained(tmp_path, max_shard_size="20KB")
    third = sorted(tmp_path.glob("*.safetensors"))[2]
    content = third.read_bytes()
    third.write_bytes(content[:-1] if fault == "cut" else b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(
        tmp_path, DataError, rf"file='{third.name}' " + {"cut": "cannot be read", "pointer": "is a pointer of"}[fault]
    )


def adapter_of(folder, base="owner/base"):
    adapted = get_peft_model(
        LlamaForCausalLM(config()), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    torch.nn.init.normal_(
        adapted.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight")
    )
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder, save_embedding_layers=False)  # peft would ask a hub about the base


def test_an_adapter_beside_the_model_is_named_and_not_used(folder, caplog):
    """transformers attaches such an adapter unasked; a build block by block never did."""
    plain = load(folder, dtype=torch.float32, kind="causal_lm").state_dict()
    adapter_of(folder)
    attached = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert any("lora_B" in name for name in attached)
    model, shards = load(folder, dtype=torch.float32, kind="causal_lm"), ShardSource(folder, torch.float32)
    assert type(model) is LlamaForCausalLM
    with shards.open("model.layers.0"):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, plain[name])
            if "layers.1" not in name:
                assert torch.equal(shards.model.state_dict()[name], tensor)
    (note,) = beside(folder)
    assert "holds an adapter beside the model (adapter_config.json, adapter_model.safetensors)" in note
    assert "used without the adapter" in note


@pytest.mark.parametrize("with_config", [False, True])
def test_a_folder_with_an_adapter_only_is_refused_with_the_name_of_its_model(tmp_path, with_config):
    adapter_of(tmp_path)
    if with_config:
        config().save_pretrained(tmp_path)
    refused(tmp_path, DataError, r"holds an adapter \(adapter_config.json\) for the model 'owner/base', and no model")


@pytest.mark.parametrize("source", ["load", "shards"])
def test_blocks_that_the_config_does_not_count_are_named_once_and_not_used(folder, caplog, capfd, source):
    wide = config()
    wide.num_hidden_layers = 3
    LlamaForCausalLM(wide).save_pretrained(folder)
    change_config(folder, num_hidden_layers=2)
    if source == "load":
        model = load(folder, dtype=torch.float32, kind="causal_lm")
    else:
        model = ShardSource(folder, torch.float32).model
    assert len(model.model.layers) == 2
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "9 stored tensors are not used, the first is 'model.layers.2.input_layernorm.weight'" in line
    assert "num_hidden_layers=2" in line
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_weights_that_transformers_would_not_read_are_named(folder):
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")
    refused(
        folder, DataError, r"has weights as consolidated\.safetensors, must have model\.safetensors, or shards with"
    )
    with pytest.raises(DataError, match=r"has weights as consolidated\.safetensors"):
        ShardSource(folder, torch.float32)


def test_another_file_of_weights_changes_neither_way_of_reading(folder):
    """Files of a training often lie beside the weights; read in the order of names, they would win."""
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model_ema.safetensors")
    norm = load(folder, dtype=torch.float32, kind="causal_lm").model.norm.weight
    assert torch.equal(norm, tensors["model.norm.weight"])
    assert torch.equal(ShardSource(folder, torch.float32).model.model.norm.weight, norm)


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
    refused(folder, DataError, r"down_proj.weight' has the shape \(32, 48\), and config.json wants \(32, 64\)")


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
    refused(folder, UnsupportedModel, r"model_type='own' must be .* code of its own, \['modeling_own.Own'\], in the")
    change_config(folder, model_type="llama", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    assert type(load(folder, dtype=torch.float32, kind="causal_lm")) is LlamaForCausalLM
    assert "code of its own (modeling_own.py); the code is not run" in beside(folder)[0]


def test_a_quantised_model_of_an_unread_format_is_refused(folder):
    change_config(folder, quantization_config={"quant_method": "fp8"})
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
