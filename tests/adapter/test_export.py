"""adapter.export: the content of the files, and the refusals of `load`."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from offsite.adapter.export import CONFIG, WEIGHTS, export, load
from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.adapter.model_card import base_name
from offsite.adapter.spec import AdapterSpec
from offsite.errors import ConfigError, DataError, DigestMismatch, OffsiteError, RangeError, UnsupportedModel

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ENDS = tuple(f"model.layers.{index}" for index in (0, 1, 6, 7))
IDS = torch.arange(16).reshape(2, 8)


def llama(hidden=32):
    torch.manual_seed(3)
    sizes = {"intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 97}
    return LlamaForCausalLM(LlamaConfig(hidden_size=hidden, num_key_value_heads=2, use_cache=False, **sizes)).eval()


def moved(model):
    layout = Layout.of(model)
    layout.write(model, layout.read(model) + np.random.default_rng(1).normal(scale=0.1, size=layout.size))
    return model


@pytest.fixture(params=["ffa_lora", "bottleneck"])
def exported(request, tmp_path):
    spec = AdapterSpec(request.param, slots=ENDS)
    export(moved(attach(llama(), spec)), spec, tmp_path, base="owner/model")
    return tmp_path


def refused(folder, kind, reason, model=None):
    with pytest.raises(kind, match=reason) as caught:
        load(model if model is not None else llama(), folder)
    assert isinstance(caught.value, OffsiteError)
    assert "\n" not in str(caught.value)


def change_config(folder, **changes):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in (values | changes).items() if v is not None}))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_the_base_is_found_where_its_folder_is_and_no_hub_is_asked_for_it(tmp_path, monkeypatch):
    """A bare name of a folder is the name of some model on a hub; a path is not."""
    llama().save_pretrained(tmp_path / "model")
    spec = AdapterSpec("ffa_lora", slots=ENDS)
    trained = moved(attach(llama(), spec))
    export(trained, spec, tmp_path / "adapter", base=base_name("model", ""))
    export(trained, spec, tmp_path / "bare", base="model")
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        wanted = trained(IDS).logits
        assert torch.equal(AutoPeftModelForCausalLM.from_pretrained("adapter")(IDS).logits, wanted)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"huggingface\.co"):  # the library asks, and has no network here
        AutoPeftModelForCausalLM.from_pretrained("../bare")
    with pytest.raises(OSError, match=r"Repo id must use .* '\./model'"):
        AutoPeftModelForCausalLM.from_pretrained("../adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "LlamaForCausalLM.from_pretrained('./model')" in card
    assert "set `base` in the table [model]" in card
    assert str(tmp_path) not in card + (tmp_path / "adapter" / CONFIG).read_text()


def classifier():
    torch.manual_seed(3)
    sizes = {"intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 97}
    config = LlamaConfig(hidden_size=32, num_key_value_heads=2, pad_token_id=0, num_labels=3, **sizes)
    return LlamaForSequenceClassification(config).eval()


@pytest.mark.parametrize("method", ["ffa_lora", "bottleneck"])
@pytest.mark.parametrize("make", [llama, classifier], ids=lambda make: make.__name__)
def test_the_lines_of_python_in_the_readme_load_what_was_trained(tmp_path, monkeypatch, make, method):
    """With `AutoModel` in them they loaded a model without a head, under other names, and nothing of the adapter."""
    make().save_pretrained(tmp_path / "model")
    spec = AdapterSpec(method, slots=ENDS)
    trained = moved(attach(make(), spec))
    export(trained, spec, tmp_path / "adapter", base=base_name("model", ""))
    code = (tmp_path / "adapter" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(IDS).logits, trained(IDS).logits)
        assert not torch.equal(make()(IDS).logits, trained(IDS).logits)


def test_a_base_that_others_know_is_recorded_and_found(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "model")
    spec = AdapterSpec("ffa_lora", slots=ENDS)
    trained = moved(attach(llama(), spec))
    export(trained, spec, tmp_path / "a", base=base_name("model", str(tmp_path / "model")))
    monkeypatch.chdir(tmp_path.parent)
    with torch.no_grad():
        assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")(IDS).logits, trained(IDS).logits)
    export(trained, spec, tmp_path / "b", base=base_name("model", "owner/name"))
    card = (tmp_path / "b" / "README.md").read_text()
    assert card.startswith("---\nbase_model: owner/name\nlibrary_name: peft\n---\n")
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["base_model_name_or_path"] == "owner/name"


def test_many_targets_of_an_emulator_do_not_spread_over_the_full_model(tmp_path):
    """With 20 targets or more peft shortens them to suffixes, and an emulator without a middle would name "q_proj"."""
    spec = AdapterSpec("ffa_lora", slots=ENDS, targets=ALL)
    emulator = llama()
    for index in range(2, 6):
        emulator.model.layers[index] = nn.Identity()
    trained = moved(attach(emulator, spec))
    export(trained, spec, tmp_path, base="owner/model")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert len(config["target_modules"]) == 28
    loaded = load(llama(), tmp_path)
    full = attach(llama(), spec)
    Layout.of(full).write(full, Layout.of(trained).read(trained))
    assert torch.equal(loaded(input_ids=IDS).logits, full(input_ids=IDS).logits)
    touched = {name.split(".lora_")[0] for name, _ in loaded.named_parameters() if ".lora_" in name}
    assert len(touched) == 28


def test_frozen_factors_are_in_the_file_but_not_in_the_layout(tmp_path):
    spec = AdapterSpec("ffa_lora", slots=ENDS)
    model = attach(llama(), spec)
    export(model, spec, tmp_path, base="b")
    stored = load_file(tmp_path / WEIGHTS)
    assert sum("lora_A" in name for name in stored) == sum("lora_B" in name for name in stored) == 8
    assert not any("lora_A" in name for name in Layout.of(model).names)


def test_a_model_outside_transformers_is_exported_with_its_class(tmp_path):
    spec = AdapterSpec("lora", slots=("0",), targets=("0",))
    make = lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2))  # noqa: E731
    torch.manual_seed(0)
    plain = make()
    model = moved(attach(plain, spec))
    export(model, spec, tmp_path, base="b")
    assert json.loads((tmp_path / CONFIG).read_text())["auto_mapping"]["base_model_class"] == "Sequential"
    torch.manual_seed(0)
    assert torch.equal(load(make(), tmp_path)(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_a_plain_model_is_not_exported(tmp_path):
    with pytest.raises(UnsupportedModel, match="not attached"):
        export(llama(), AdapterSpec("lora", slots=ENDS), tmp_path, base="b")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_refused(exported, name):
    (exported / name).unlink()
    (exported / "adapter_model.bin").write_bytes(b"never unpickled")
    refused(exported, DataError, f"has no {name}")


def test_a_missing_directory_is_refused_without_asking_a_hub():
    refused("owner/adapter", DataError, "has no adapter_config")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_damaged_file_is_refused(exported, name):
    (exported / name).write_bytes((exported / name).read_bytes()[:40])
    refused(exported, DataError, "damaged file")


def test_a_config_without_method_is_refused(exported):
    change_config(exported, offsite_method=None, peft_type=None)
    refused(exported, DataError, "without a method")


def test_a_value_that_is_no_number_is_refused(exported):
    change_tensors(exported, lambda tensors: min(tensors.items())[1].view(-1)[:1].fill_(float("nan")))
    refused(exported, RangeError, "holds NaN or Inf")


def test_an_adapter_of_another_width_is_refused(exported):
    refused(exported, (UnsupportedModel, DigestMismatch), "load the base the adapter was made for", llama(hidden=64))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_a_missing_or_unknown_tensor_is_refused(exported):
    name = min(load_file(exported / WEIGHTS))
    change_tensors(exported, lambda tensors: tensors.update({name + "x": tensors.pop(name)}))
    refused(exported, (UnsupportedModel, DigestMismatch), "load the base the adapter was made for")


def test_a_model_with_an_adapter_takes_no_second(exported):
    refused(exported, UnsupportedModel, "at most one", attach(llama(), AdapterSpec("lora", slots=ENDS)))


def test_our_own_config_is_read_strictly(tmp_path):
    spec = AdapterSpec("bottleneck", slots=ENDS)
    export(attach(llama(), spec), spec, tmp_path, base="b")
    change_config(tmp_path, more=1)
    refused(tmp_path, DataError, "config keys=")
    export(attach(llama(), spec), spec, tmp_path, base="b")
    change_config(tmp_path, offsite_method="bitfit")
    refused(tmp_path, ConfigError, "is not spec='bottleneck'")
    export(attach(llama(), spec), spec, tmp_path, base="b")
    change_config(tmp_path, offsite_version=2)
    refused(tmp_path, DataError, "export it again")
