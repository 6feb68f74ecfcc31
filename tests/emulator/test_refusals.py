"""A package with a byte, name or fact that is not the announced one does not load; a bad model is not built."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.package import package_folder
from offsite.emulator.package.manifest import CONFIG, MANIFEST, WEIGHTS
from offsite.emulator.package.package_reader import load, read_manifest
from offsite.emulator.structure.from_config import empty_model
from offsite.emulator.structure.geometry import Geometry
from offsite.errors import (
    ConfigError,
    DataError,
    DigestMismatch,
    MalformedMessage,
    RangeError,
    UnknownName,
    UnsupportedModel,
)


def rewrite(directory, change):
    """Changes the manifest like an attacker who can rewrite the manifest but not its announced digest."""
    values = json.loads((directory / MANIFEST).read_bytes())
    change(values)
    (directory / MANIFEST).write_bytes(json.dumps(values, indent=1, sort_keys=True).encode() + b"\n")


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_any_changed_byte_is_refused(package, file):
    content = (package / file).read_bytes()
    for position in (0, 9, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[position] ^= 1
        (package / file).write_bytes(changed)
        with pytest.raises(DigestMismatch, match=file):
            load(package)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_weights(package, size):
    content = (package / WEIGHTS).read_bytes()
    (package / WEIGHTS).write_bytes(content[:size])
    with pytest.raises(DigestMismatch, match=WEIGHTS):
        load(package)


def test_missing_added_and_linked_files(package, tmp_path):
    (package / "added_tokens.json").write_text("{}")
    with pytest.raises(DigestMismatch, match=r"added_tokens\.json"):
        load(package)
    (package / "added_tokens.json").unlink()
    shutil.move(package / CONFIG, tmp_path / "elsewhere")
    with pytest.raises(DigestMismatch, match=r"config\.json.*missing"):
        load(package)
    (package / CONFIG).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DigestMismatch, match="not a plain file"):
        load(package)


def test_expected_digest(package):
    digest = read_manifest(package).digest()
    load(package, expected_digest=digest)
    with pytest.raises(DigestMismatch, match="announced 0000"):
        load(package, expected_digest="0" * 64)
    rewrite(package, lambda values: values.update(slot_bytes=values["slot_bytes"] + 1))
    with pytest.raises(DigestMismatch, match=r"manifest\.json"):
        load(package, expected_digest=digest)


def test_missing_package(tmp_path):
    with pytest.raises(DataError, match=r"no manifest\.json; build"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".hidden", "a\\b", "", "manifest.json"])
def test_file_names_that_leave_the_folder(package, name):
    rewrite(package, lambda values: values["files"].update({name: values["files"][CONFIG]}))
    with pytest.raises(MalformedMessage, match="not a plain file name"):
        load(package)


def first_key(values, ending=""):
    return next(key for key in values if key.endswith(ending))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda v: v.update(surprise=1), MalformedMessage, "surprise"),
        (lambda v: v.pop("tied"), MalformedMessage, "tied"),
        (lambda v: v.update(format=1), MalformedMessage, "format=1"),
        (lambda v: v.update(full_bytes=-1), MalformedMessage, "full_bytes=-1"),
        (lambda v: v.update(full_bytes=True), MalformedMessage, "full_bytes=True"),
        (lambda v: v.update(full_bytes=0), MalformedMessage, "full_bytes=0"),
        (lambda v: v.update(recipe="int4"), MalformedMessage, "recipe='int4' must be a list"),
        (lambda v: v.update(auto="os.system"), UnknownName, "auto="),
        (lambda v: v.update(dtype="float8"), UnknownName, "dtype="),
        (lambda v: v["geometry"].update(tower="model"), UnknownName, "tower="),
        (lambda v: v["geometry"].update(first=-1), MalformedMessage, "first=-1"),
        (lambda v: v["geometry"].update(first=9), ConfigError, "no middle is left"),
        (lambda v: v["skipped"].update({"model.layers.0": ["tensor"]}), MalformedMessage, "not a block of the middle"),
        (lambda v: v["storage"].update({"x": "bf16"}), MalformedMessage, "names are not the model's"),
        (lambda v: v["storage"].pop("model.norm.weight"), MalformedMessage, "names are not the model's"),
        (lambda v: v["storage"].update({"model.norm.weight": "pickle"}), MalformedMessage, "storage='pickle'"),
        (lambda v: v["storage"].update({"model.norm.weight": "int4:0"}), MalformedMessage, "storage='int4:0'"),
        (lambda v: v["storage"].update({"model.norm.weight": "bf16"}), RangeError, "model.norm.weight"),
        (
            lambda v: v["storage"].update({"model.layers.0.mlp.up_proj.weight": "int4:64"}),
            MalformedMessage,
            "must be verbatim",
        ),
        (lambda v: v["tied"].update({"lm_head.weight": "nothing"}), MalformedMessage, "not a stored tensor"),
        (lambda v: v["tensors"].pop("model.norm.weight"), DigestMismatch, "model.norm.weight"),
        (lambda v: v["tensors"].update({"model.norm.weight": "0" * 64}), DigestMismatch, "model.norm.weight"),
        (lambda v: v["tensors"].update({"model.norm.weight": "A" * 64}), MalformedMessage, "SHA-256"),
    ],
)
def test_manifests_that_contradict_the_files(package, change, error, match):
    rewrite(package, change)
    with pytest.raises(error, match=match):
        load(package)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"format": NaN}', b"\xff", b"[" * 100000])
def test_bytes_that_are_no_manifest(package, content):
    (package / MANIFEST).write_bytes(content)
    with pytest.raises(MalformedMessage):
        load(package)


def reseal(directory, name):
    """Makes the manifest's hashes fit again, like the builder of a bad package."""
    entry = package_folder.entries(directory)[name]
    hashes = {}
    if name == WEIGHTS:
        hashes = {key: package_folder.tensor_sha256(tensor) for key, tensor in load_file(directory / name).items()}

    def change(values):
        values["files"][name] = {"sha256": entry.sha256, "bytes": entry.bytes}
        values["tensors"].update({key: value for key, value in hashes.items() if key in values["tensors"]})

    rewrite(directory, change)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t: t.update(extra=torch.ones(1)), DigestMismatch, "'extra' is missing or was added"),
        (lambda t: t.pop("model.norm.weight"), DigestMismatch, "missing or was added"),
        (lambda t: t["model.norm.weight"].fill_(math.nan), RangeError, "not finite"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), RangeError, r"stored \(31,\)"),
        (lambda t: t[first_key(t, "#scales")].fill_(math.inf), RangeError, "not finite"),
        (lambda t: t.update({first_key(t, "#codes"): torch.ones(3, dtype=torch.uint8)}), RangeError, "do not belong"),
    ],
)
def test_a_sealed_package_with_bad_tensors_is_refused(package, change, error, match):
    tensors = load_file(package / WEIGHTS)
    change(tensors)
    save_file(tensors, package / WEIGHTS)
    reseal(package, WEIGHTS)
    with pytest.raises(error, match=match):
        load(package)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("auto_map", {"AutoModelForCausalLM": "evil.Model"}, "auto_map"),
        ("_attn_implementation", "someone/kernel", "attn_implementation"),
        ("quantization_config", {"quant_method": "gptq"}, "quantization_config"),
        ("model_type", "evil", "model_type='evil'"),
        ("model_type", None, "model_type=None"),
    ],
)
def test_a_sealed_configuration_that_asks_for_code_is_refused(package, key, value, match):
    values = json.loads((package / CONFIG).read_text())
    values[key] = value
    (package / CONFIG).write_text(json.dumps(values))
    reseal(package, CONFIG)
    with pytest.raises(MalformedMessage, match=match):
        load(package)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_name_their_tensor(llama, tmp_path, name, value):
    llama.model.get_parameter(name).view(-1)[3] = value
    with pytest.raises(UnsupportedModel, match=f"tensor={name}"):
        llama.build(tmp_path / "p", ("int4",))


def test_weights_outside_fp16_name_their_tensor(llama, tmp_path):
    llama.model.model.layers[3].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(UnsupportedModel, match=r"tensor=model\.layers\.3\.mlp\.up_proj\.weight"):
        llama.build(tmp_path / "p", ("int4",))


def test_a_model_its_configuration_does_not_rebuild(llama, make, tmp_path):
    llama.model.config.intermediate_size = 49
    with pytest.raises(UnsupportedModel, match="does not rebuild"):
        llama.build(tmp_path / "a")
    untied = make("llama_untied")
    untied.model.config.tie_word_embeddings = True
    with pytest.raises(UnsupportedModel, match="lm_head"):
        untied.build(tmp_path / "b")
    rotated = make("mistral")
    rotated.model.model.rotary_emb.inv_freq.mul_(2)
    with pytest.raises(UnsupportedModel, match="inv_freq"):
        rotated.build(tmp_path / "c")
    mixed = make("opt")
    mixed.model.lm_head.to(torch.bfloat16)
    with pytest.raises(UnsupportedModel, match="dtypes="):
        mixed.build(tmp_path / "d")


def test_a_model_without_a_configuration(tmp_path):
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(6)))
    with pytest.raises(UnsupportedModel, match="transformers configuration"):
        write_package(model, EmulatorDesign(Geometry("", 1, 1), (), "verbatim"), None, tmp_path / "p")


def test_a_directory_in_use_is_refused(llama, package):
    with pytest.raises(ConfigError, match="not empty"):
        llama.build(package)


def test_unfinished_packages_do_not_load(llama, tmp_path):
    with pytest.raises(ConfigError):
        llama.build(tmp_path / "p", ("int4",), "int3")
    with pytest.raises(DataError):
        load(tmp_path / "p")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"num_hidden_layers": 60_000_000}, "asks for over 100000 modules"),
        ({"num_hidden_layers": 1 << 40}, "no honest model has over"),
        ({"vocab_size": 1 << 31}, "no honest model has over"),
        ({"hidden_size": 1 << 26, "intermediate_size": 1 << 26}, "more memory than there is"),
        ({"head_dim": [[[1 << 33]]]}, "no honest model has over"),
    ],
)
def test_a_configuration_that_is_a_bomb_is_refused(package, changed, match):
    """A package of a few kilobytes must not make its reader allocate terabytes or build millions of blocks."""
    config = json.loads((package / CONFIG).read_text()) | {"layer_types": None} | changed
    with pytest.raises(MalformedMessage, match=match):
        empty_model(json.dumps(config), "causal_lm", torch.float32)


def test_a_nested_configuration_is_refused():
    text = "[" * 100_000 + "]" * 100_000
    with pytest.raises(MalformedMessage, match="not JSON"):
        empty_model(text, "causal_lm", torch.float32)
