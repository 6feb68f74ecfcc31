"""build -> files -> load: bit for bit where it must be, refused where a byte is not the announced one."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file

from offsite.emulator.package.manifest import CONFIG, MANIFEST, WEIGHTS, Manifest
from offsite.emulator.package.package_reader import load, read_manifest
from offsite.emulator.structure.from_config import AUTO
from offsite.emulator.structure.geometry import Geometry
from offsite.errors import DataError, DigestMismatch, UnsupportedModel


def test_identity_emulator_is_the_model_bit_for_bit(family, tmp_path):
    manifest = family.build(tmp_path / "p")
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
        family.build(tmp_path / name)
        emulator = load(tmp_path / name)
        assert next(emulator.parameters()).dtype == dtype
        assert torch.equal(family.run(emulator), family.run(family.model))


def test_every_family_runs_with_skips_and_codes(family, tmp_path):
    manifest = family.build(tmp_path / "p", ("skip_importance:0.5", "int4:16"), "int8:16")
    emulator = load(tmp_path / "p")
    assert torch.isfinite(family.run(emulator)).all()
    assert not torch.equal(family.run(emulator), family.run(family.model))
    assert 1 <= len(manifest.skipped) < len(Geometry.of(family.model, 2, 1).middle(family.model))
    names = {name for name, _ in family.model.named_modules()}
    assert {name for name, _ in emulator.named_modules()} < names
    assert manifest.middle_ratio < 0.5


FITTED = {
    "patched": ("skip_importance:0.34", "refit", "patch", "gptq4:16"),
    "thin": ("lowrank:0.7", "int8:16"),
    "narrow": ("narrow:0.5", "gptq4:16", "center"),
    "shared": ("share:0.5", "prune_2_4"),
}
# Compressors that a family refuses: a mixture's experts are one stacked tensor, so it has no pair of dense layers.
REFUSED = {("mixtral", "patched"), ("mixtral", "narrow")}


@pytest.mark.parametrize("name", FITTED)
def test_every_family_runs_with_what_is_fitted_to_its_examples(family, name, tmp_path):
    if (family.name, name) in REFUSED:
        with pytest.raises(UnsupportedModel, match="no feed-forward network of dense layers"):
            family.build(tmp_path / "p", FITTED[name])
        return
    manifest = family.build(tmp_path / "p", FITTED[name])
    emulator = load(tmp_path / "p")
    assert torch.isfinite(family.run(emulator)).all()
    assert not torch.equal(family.run(emulator), family.run(family.model))
    assert manifest.middle_ratio < 1


def test_one_dimensional_tensors_of_the_middle_stay(family, tmp_path):
    manifest = family.build(tmp_path / "p", ("int4:16",))
    emulator = load(tmp_path / "p")
    for path in Geometry.of(family.model, 2, 1).middle(family.model):
        for name, parameter in family.model.get_submodule(path).named_parameters(prefix=path):
            assert manifest.storage[name].startswith("int4") == (parameter.dim() > 1)
            assert torch.equal(emulator.get_parameter(name), parameter) == (parameter.dim() == 1)


def test_a_widened_checkpoint_is_stored_in_its_16_bits(make, tmp_path):
    family = make("llama_tied", torch.bfloat16)
    family.model.float()
    manifest = family.build(tmp_path / "p")
    assert set(manifest.storage.values()) == {"bf16"}
    assert manifest.slot_bytes + manifest.middle_bytes + manifest.embedding_bytes + manifest.other_bytes == (
        manifest.full_bytes
    )
    assert torch.equal(family.run(load(tmp_path / "p")), family.run(family.model))


def test_bytes_are_counted_by_a_second_way(make, tmp_path):
    family = make("llama_tied", torch.bfloat16)
    manifest = family.build(tmp_path / "p", ("skip_uniform:0.34", "int4:16"), "int8")
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
    tied, untied = (make(name).build(tmp_path / name) for name in ("llama_tied", "llama_untied"))
    assert tied.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert untied.tied == {}
    assert "lm_head.weight" not in tied.storage
    emulator = load(tmp_path / "llama_tied")
    assert emulator.lm_head.weight is emulator.model.embed_tokens.weight
    for setting in ("int8", "int4"):
        manifest = make("llama_untied").build(tmp_path / setting, (), setting)
        assert manifest.storage["lm_head.weight"] == manifest.storage["model.embed_tokens.weight"] == f"{setting}:64"


def test_same_input_gives_the_same_bytes(llama, tmp_path):
    first, second = (llama.build(tmp_path / name, ("skip_importance:0.34", "int4:16"), "int8") for name in ("a", "b"))
    assert first.digest() == second.digest()
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_building_and_loading_leave_model_and_global_generator(llama, tmp_path):
    before, state = {n: t.clone() for n, t in llama.model.state_dict().items()}, torch.get_rng_state()
    llama.build(tmp_path / "p", ("skip_importance:0.34", "int4"), "int8")
    load(tmp_path / "p")
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    torch.nn.init.constant_(weight := torch.zeros(2), 3.0)  # the loader turned initialisation off; it must work again
    assert weight.tolist() == [3, 3]


def test_dtype_argument(llama, tmp_path):
    llama.build(tmp_path / "p", ("int4:16",))
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
    llama.build(tmp_path / "p")
    text = (tmp_path / "p" / CONFIG).read_text()
    assert "secret" not in text
    assert "auto_map" not in text


def test_tokenizer_files_are_part_of_the_package(llama, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "modeling_evil.py", "model.safetensors"):
        (source / name).write_text("{}")
    manifest = llama.build(tmp_path / "p", tokenizer=source)
    assert set(manifest.files) == {WEIGHTS, CONFIG, "tokenizer.json", "tokenizer_config.json"}
    load(tmp_path / "p")
    (tmp_path / "p" / "tokenizer.json").write_text("{ }")
    with pytest.raises(DigestMismatch, match=r"tokenizer\.json"):
        load(tmp_path / "p")
    with pytest.raises(DataError, match="holds no tokenizer file"):
        llama.build(tmp_path / "q", tokenizer=tmp_path)


def test_a_manifest_has_its_name_after_what_it_lists_is_on_disk(llama, tmp_path, monkeypatch):
    source, target, fsync, synced = tmp_path / "model", tmp_path / "new" / "p", os.fsync, []
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")

    def watched(descriptor):
        synced.append((os.fstat(descriptor).st_ino, (target / MANIFEST).exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    manifest = llama.build(target, tokenizer=source)
    for path in (*(target / name for name in manifest.files), target, target.parent):
        assert (path.stat().st_ino, False) in synced, path
    assert ((target / MANIFEST).stat().st_ino, False) in synced
    assert synced[-1] == (target.stat().st_ino, True)
    load(target, expected_digest=manifest.digest())


def test_a_disk_that_does_not_take_a_package_leaves_none(llama, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"^package=.*No space left on device.*free disk space"):
        llama.build(tmp_path / "p")
    with pytest.raises(DataError, match=f"has no {MANIFEST}"):
        load(tmp_path / "p")


def test_auto_classes_are_named_once():
    assert len({id(kind) for kind in AUTO.values()}) == len(AUTO)
