"""The file of auxiliary tensors in a package: the same bytes every time, announced, bounded, and vetted before use."""

import dataclasses
import hashlib
import json

import pytest
import torch
from safetensors.torch import save

from offsite.adapter.methods import attach, dummy_tensors
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.build.pipeline import BuildPipeline, Order, Public
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.calibration.source import MemorySource
from offsite.emulator.evaluation.fidelity import gradient_cosine, visiting
from offsite.emulator.evaluation.rehearse import Lesson, Text
from offsite.emulator.package.auxiliary_file import HEADER_ROOM, read
from offsite.emulator.package.manifest import GIVEN, FileEntry
from offsite.emulator.package.package_reader import load, read_manifest
from offsite.emulator.runtime.refresh_state import Frame
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.emulator.vetting.vet import Slots, vet, vet_auxiliary
from offsite.errors import ConfigError, DigestMismatch, MalformedMessage, RangeError, UnsupportedModel
from offsite.task.tasks import TASKS


@pytest.fixture
def spec(llama):
    return AdapterSpec("madx", slots=("model.layers.0", "model.layers.1"), rank=2)


@pytest.fixture
def given(llama, spec):
    return dummy_tensors(llama.model, spec)


@pytest.fixture
def folder(llama, given, tmp_path):
    llama.build(tmp_path / "p", ("int4:16",), auxiliary=given)
    return tmp_path / "p"


def replaced(folder, tensors):
    """Makes the package of a hostile coordinator: another file, honestly announced."""
    content = tensors if isinstance(tensors, bytes) else save(tensors)
    (folder / GIVEN).write_bytes(content)
    manifest = read_manifest(folder)
    entry = FileEntry(hashlib.sha256(content).hexdigest(), len(content))
    lied = dataclasses.replace(manifest, files=manifest.files | {GIVEN: entry})
    (folder / "manifest.json").write_bytes(lied.to_bytes())
    return lied


def test_what_went_in_comes_out_and_nothing_else_changed(llama, folder, given, tmp_path):
    manifest = read_manifest(folder)
    assert manifest.files[GIVEN].bytes == (folder / GIVEN).stat().st_size
    found = read(folder, manifest)
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
    plain = llama.build(tmp_path / "q", ("int4:16",))
    assert GIVEN not in plain.files
    assert read(tmp_path / "q", plain) == {}
    assert manifest.files == plain.files | {GIVEN: manifest.files[GIVEN]}
    assert dataclasses.replace(manifest, files=plain.files) == plain
    assert load(folder).state_dict().keys() == load(tmp_path / "q").state_dict().keys()


def test_the_bytes_do_not_depend_on_the_order(llama, given, folder, tmp_path):
    llama.build(tmp_path / "q", ("int4:16",), auxiliary=dict(reversed(given.items())))
    assert (folder / GIVEN).read_bytes() == (tmp_path / "q" / GIVEN).read_bytes()


@pytest.mark.parametrize("place", [0, 20, -1])
def test_an_altered_byte_is_refused(folder, place):
    manifest, content = read_manifest(folder), bytearray((folder / GIVEN).read_bytes())
    content[place] ^= 1
    (folder / GIVEN).write_bytes(content)
    with pytest.raises(DigestMismatch, match=GIVEN):
        read(folder, manifest)
    with pytest.raises(DigestMismatch, match=GIVEN):
        load(folder)


def test_a_missing_file_and_a_link_are_refused(folder, tmp_path):
    manifest = read_manifest(folder)
    (folder / GIVEN).rename(tmp_path / "elsewhere")
    with pytest.raises(DigestMismatch, match=GIVEN):
        read(folder, manifest)
    (folder / GIVEN).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DigestMismatch, match=GIVEN):
        read(folder, manifest)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", json.dumps({"a": 1}).encode(), b"\xff" * 64])
def test_only_safetensors_are_read(folder, content):
    with pytest.raises(MalformedMessage, match="not a safetensors file"):
        read(folder, replaced(folder, content))


def test_a_long_header_is_never_parsed(folder):
    header = json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)})
    content = len(header).to_bytes(8, "little") + header.encode()
    with pytest.raises(MalformedMessage, match=f"a header of over {HEADER_ROOM} bytes"):
        read(folder, replaced(folder, content))


def test_more_bytes_than_the_slots_have_are_never_read(folder):
    model = load(folder, dtype=torch.float32)
    room = 4 * Slots.of(model, read_manifest(folder)).parameters
    large = replaced(folder, {"x": torch.zeros((room + HEADER_ROOM) // 4 + 1)})
    (folder / GIVEN).unlink()  # the announced size alone must be refused
    with pytest.raises(RangeError, match=f"at most {room} are taken, as many as the slots' blocks have"):
        read(folder, large, max_bytes=room)


def test_a_vetting_refuses_what_is_too_many_or_too_large(folder, given):
    model = load(folder, dtype=torch.float32)
    vet(folder, model, read_manifest(folder), VettingThresholds(), seed=1)
    name = sorted(given)[0]
    loud = dict(given) | {name: given[name] + 1e4}
    with pytest.raises(UnsupportedModel, match=r"vetting given_peak=1e\+04"):
        vet(folder, model, replaced(folder, loud), VettingThresholds(), seed=1)
    with pytest.raises(RangeError, match="do not train on this emulator"):
        vet(folder, model, replaced(folder, {"x": torch.zeros(2**22)}), VettingThresholds(), seed=1)


def test_frozen_adapters_that_drown_a_block_are_refused_where_they_stand(folder, given, spec):
    """Every value has an honest size; together the values give all of a record's tokens the same code."""
    manifest = read_manifest(folder)
    frame = Frame.of(folder, manifest)

    def opened(tensors):
        return attach(load(folder, dtype=torch.float32), spec, tensors)

    vet_auxiliary(opened(given), frame, VettingThresholds(), seed=1)
    drowned = {name: torch.full_like(t, 90.0) if name.endswith("up.bias") else t for name, t in given.items()}
    with pytest.raises(UnsupportedModel, match="vetting "):
        vet_auxiliary(opened(drowned), frame, VettingThresholds(), seed=1)


def test_gate_and_visit_take_them_and_leave_no_trace(llama, folder, given, spec):
    emulator = load(folder)
    before = [(name, id(m), len(m._forward_hooks)) for name, m in llama.model.named_modules()]
    assert gradient_cosine(llama.model, emulator, spec, llama.losses, given) > 0.5
    with visiting(llama.model, spec, given) as adapted:
        assert any("offsite_frozen" in name for name, _ in adapted.named_modules())
    assert [(name, id(m), len(m._forward_hooks)) for name, m in llama.model.named_modules()] == before
    with pytest.raises(MalformedMessage, match="is missing"):
        gradient_cosine(llama.model, emulator, spec, llama.losses)
    assert Lesson(spec).auxiliary == {}


@pytest.mark.parametrize("adapter", [AdapterSpec("madx"), AdapterSpec("masked", options=(("by", "fisher"),))])
def test_a_package_built_alone_has_nothing_to_give(llama, tmp_path, adapter):
    examples = PublicExamples(TASKS["causal_lm"], TASKS["causal_lm"].dummy_batch(llama.model, 9, seed=1))
    public = Public(examples, examples, Text(examples, examples, examples, 9))
    builder = BuildPipeline(MemorySource(llama.model), Order(recipe=("int8:16",), adapter=adapter), public, None)
    with pytest.raises(ConfigError, match="needs auxiliary tensors, which only a job has"):
        builder.build(tmp_path / "p")
    assert not (tmp_path / "p").exists()
