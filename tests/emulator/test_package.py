"""build -> files -> load: bit for bit where it must be, refused where a byte is not the announced one."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from emulator.geometry import Geometry
from emulator.manifest import CONFIG, MANIFEST, WEIGHTS, Manifest
from emulator.package import build, load, read_manifest
from emulator.rebuild import AUTO
from errors import ConfigError, DataError, DigestMismatch, MalformedMessage, RangeError, UnknownName, UnsupportedModel


def make_package(family, directory, recipe=(), embedding="verbatim", **options):
    geometry = Geometry.of(family.model, 2, 1)
    return build(family.model, geometry, recipe, embedding, family.calibrate, directory, **options)


def rewrite(directory, change):
    """Changes the manifest as an attacker would who can rewrite it but not its announced digest."""
    values = json.loads((directory / MANIFEST).read_bytes())
    change(values)
    (directory / MANIFEST).write_bytes(json.dumps(values, indent=1, sort_keys=True).encode() + b"\n")


@pytest.fixture
def package(llama, tmp_path):
    make_package(llama, tmp_path / "p", ("skip_uniform:0.34", "int4:16"), "int8")
    return tmp_path / "p"


def test_identity_emulator_is_the_model_bit_for_bit(family, tmp_path):
    manifest = make_package(family, tmp_path / "p")
    emulator = load(tmp_path / "p", expected_digest=manifest.digest())
    assert type(emulator) is type(family.model)
    full, other = family.model.state_dict(), emulator.state_dict()
    assert list(full) == list(other)
    assert all(torch.equal(full[name], other[name]) for name in full)
    assert torch.equal(family.run(emulator), family.run(family.model))
    assert not any(p.requires_grad for p in emulator.parameters())
    assert not emulator.training
    assert manifest.verbatim == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_identity_holds_in_half_precision(make, tmp_path, dtype):
    for name in ("llama_tied", "gpt2", "gemma3"):
        family = make(name, dtype)
        make_package(family, tmp_path / name)
        emulator = load(tmp_path / name)
        assert next(emulator.parameters()).dtype == dtype
        assert torch.equal(family.run(emulator), family.run(family.model))


def test_every_family_runs_with_skips_and_codes(family, tmp_path):
    manifest = make_package(family, tmp_path / "p", ("skip_importance:0.5", "int4:16"), "int8:16")
    emulator = load(tmp_path / "p")
    assert torch.isfinite(family.run(emulator)).all()
    assert not torch.equal(family.run(emulator), family.run(family.model))
    assert 1 <= len(manifest.skipped) < len(Geometry.of(family.model, 2, 1).middle(family.model))
    names = {name for name, _ in family.model.named_modules()}
    assert {name for name, _ in emulator.named_modules()} < names
    assert manifest.middle_ratio < 0.5


def test_one_dimensional_tensors_of_the_middle_stay(family, tmp_path):
    manifest = make_package(family, tmp_path / "p", ("int4:16",))
    emulator = load(tmp_path / "p")
    for path in Geometry.of(family.model, 2, 1).middle(family.model):
        for name, parameter in family.model.get_submodule(path).named_parameters(prefix=path):
            assert manifest.storage[name].startswith("int4") == (parameter.dim() > 1)
            assert torch.equal(emulator.get_parameter(name), parameter) == (parameter.dim() == 1)


def test_a_widened_checkpoint_is_stored_in_its_16_bits(make, tmp_path):
    family = make("llama_tied", torch.bfloat16)
    family.model.float()
    manifest = make_package(family, tmp_path / "p")
    assert set(manifest.storage.values()) == {"bf16"}
    assert manifest.slot_bytes + manifest.middle_bytes + manifest.embedding_bytes + manifest.other_bytes == (
        manifest.full_bytes
    )
    assert torch.equal(family.run(load(tmp_path / "p")), family.run(family.model))


def test_bytes_are_counted_by_a_second_way(make, tmp_path):
    family = make("llama_tied", torch.bfloat16)
    manifest = make_package(family, tmp_path / "p", ("skip_uniform:0.34", "int4:16"), "int8")
    stored = load_file(tmp_path / "p" / WEIGHTS)
    payload = {name: tensor.numel() * tensor.element_size() for name, tensor in stored.items()}
    assert manifest.shipped_bytes == (tmp_path / "p" / WEIGHTS).stat().st_size
    assert manifest.full_bytes == 2 * sum(p.numel() for p in family.model.parameters())
    assert manifest.embedding_bytes == sum(size for name, size in payload.items() if "embed_tokens" in name)
    slots = ("model.layers.0.", "model.layers.1.", "model.layers.5.")
    assert manifest.slot_bytes == sum(size for name, size in payload.items() if name.startswith(slots))
    total = manifest.slot_bytes + manifest.embedding_bytes + manifest.middle_bytes + manifest.other_bytes
    assert total == sum(payload.values())
    layer = 2 * sum(p.numel() for p in family.model.model.layers[2].parameters())
    assert manifest.middle_full_bytes == 3 * layer
    assert manifest.middle_ratio == manifest.middle_bytes / (3 * layer)
    assert manifest.package_bytes == sum(f.stat().st_size for f in (tmp_path / "p").iterdir() if f.name != MANIFEST)
    # in 4-bit codes with 16-bit norms: what is verbatim is slots, norms and the final norm
    exact = 3 * layer + 2 * 2 * 2 * 32 + 2 * 32
    assert manifest.verbatim == exact / manifest.full_bytes


def test_tied_weights_are_stored_once(make, tmp_path):
    tied, untied = (make_package(make(name), tmp_path / name) for name in ("llama_tied", "llama_untied"))
    assert tied.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert untied.tied == {}
    assert "lm_head.weight" not in tied.storage
    emulator = load(tmp_path / "llama_tied")
    assert emulator.lm_head.weight is emulator.model.embed_tokens.weight
    for setting in ("int8", "int4"):
        manifest = make_package(make("llama_untied"), tmp_path / setting, (), setting)
        assert manifest.storage["lm_head.weight"] == manifest.storage["model.embed_tokens.weight"] == f"{setting}:64"


def test_same_input_gives_the_same_bytes(llama, tmp_path):
    first, second = (
        make_package(llama, tmp_path / name, ("skip_importance:0.34", "int4:16"), "int8") for name in ("a", "b")
    )
    assert first.digest() == second.digest()
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_building_and_loading_leave_model_and_global_generator(llama, tmp_path):
    before, state = {n: t.clone() for n, t in llama.model.state_dict().items()}, torch.get_rng_state()
    make_package(llama, tmp_path / "p", ("skip_importance:0.34", "int4"), "int8")
    load(tmp_path / "p")
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    torch.nn.init.constant_(weight := torch.zeros(2), 3.0)  # initialisation works again after the loader turned it off
    assert weight.tolist() == [3, 3]


def test_dtype_argument(llama, tmp_path):
    make_package(llama, tmp_path / "p", ("int4:16",))
    wide, narrow = load(tmp_path / "p"), load(tmp_path / "p", dtype=torch.bfloat16)
    for name, parameter in narrow.named_parameters():
        assert torch.equal(parameter, wide.get_parameter(name).to(torch.bfloat16))


def test_manifest_round_trip(package):
    manifest = read_manifest(package)
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert Manifest.from_dict(manifest.to_dict()) == manifest
    assert len(manifest.digest()) == 64
    assert manifest.config_sha256 == manifest.files[CONFIG].sha256


def test_the_owners_path_and_code_are_not_in_the_configuration(llama, tmp_path):
    llama.model.config._name_or_path = "/home/owner/secret"
    llama.model.config.auto_map = {"AutoModel": "evil.Model"}
    make_package(llama, tmp_path / "p")
    text = (tmp_path / "p" / CONFIG).read_text()
    assert "secret" not in text
    assert "auto_map" not in text


def test_tokenizer_files_are_part_of_the_package(llama, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "modeling_evil.py", "model.safetensors"):
        (source / name).write_text("{}")
    manifest = make_package(llama, tmp_path / "p", tokenizer=source)
    assert set(manifest.files) == {WEIGHTS, CONFIG, "tokenizer.json", "tokenizer_config.json"}
    load(tmp_path / "p")
    (tmp_path / "p" / "tokenizer.json").write_text("{ }")
    with pytest.raises(DigestMismatch, match=r"tokenizer\.json"):
        load(tmp_path / "p")
    with pytest.raises(DataError, match="holds no tokenizer file"):
        make_package(llama, tmp_path / "q", tokenizer=tmp_path)


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
        (lambda v: v.update(format=2), MalformedMessage, "format=2"),
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
    """Makes the manifest's hashes fit again, as the builder of a bad package would."""
    from emulator import files

    entry = files.entries(directory)[name]
    hashes = {}
    if name == WEIGHTS:
        hashes = {key: files.tensor_sha256(tensor) for key, tensor in load_file(directory / name).items()}

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
        make_package(llama, tmp_path / "p", ("int4",))


def test_weights_outside_fp16_name_their_tensor(llama, tmp_path):
    llama.model.model.layers[3].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(UnsupportedModel, match=r"tensor=model\.layers\.3\.mlp\.up_proj\.weight"):
        make_package(llama, tmp_path / "p", ("int4",))


def test_a_model_its_configuration_does_not_rebuild(llama, make, tmp_path):
    llama.model.config.intermediate_size = 49
    with pytest.raises(UnsupportedModel, match="does not rebuild"):
        make_package(llama, tmp_path / "a")
    untied = make("llama_untied")
    untied.model.config.tie_word_embeddings = True
    with pytest.raises(UnsupportedModel, match="lm_head"):
        make_package(untied, tmp_path / "b")
    rotated = make("mistral")
    rotated.model.model.rotary_emb.inv_freq.mul_(2)
    with pytest.raises(UnsupportedModel, match="inv_freq"):
        make_package(rotated, tmp_path / "c")
    mixed = make("opt")
    mixed.model.lm_head.to(torch.bfloat16)
    with pytest.raises(UnsupportedModel, match="dtypes="):
        make_package(mixed, tmp_path / "d")


def test_a_model_without_a_configuration(tmp_path):
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(6)))
    with pytest.raises(UnsupportedModel, match="transformers configuration"):
        build(model, Geometry("", 1, 1), (), "verbatim", None, tmp_path / "p")


def test_a_directory_in_use_is_refused(llama, package):
    with pytest.raises(ConfigError, match="not empty"):
        make_package(llama, package)


def test_unfinished_packages_do_not_load(llama, tmp_path):
    with pytest.raises(ConfigError):
        make_package(llama, tmp_path / "p", ("int4",), "int3")
    with pytest.raises(DataError):
        load(tmp_path / "p")


def test_auto_classes_are_named_once():
    assert len({id(kind) for kind in AUTO.values()}) == len(AUTO)
