"""The promises of every entry of COMPRESSORS; a new entry needs one line in CASES and nothing else."""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from offsite.adapter.targets import is_linear
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration, Middle
from offsite.emulator.calibration.source import MemorySource
from offsite.emulator.compressors import COMPRESSORS, apply, make_plan
from offsite.emulator.package.package_reader import load
from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.structure.replacements import weight_of
from offsite.emulator.vetting.structure_checks import check_structure
from offsite.errors import ConfigError, OffsiteError, UnknownName


@dataclass(frozen=True)
class Case:
    """A usual recipe with the compressor in it, and arguments that must be refused."""

    recipe: tuple[str, ...]
    refused: tuple[str, ...]
    compute: bool = False  # multiply-adds fall
    parallel: bool = False  # works where every block carries an adapter


SHARE = ("", "0", "-0.1", "1.01", "x", "nan", "1/0")
GROUP = ("0", "1", "-4", "x", "4097", "1.5", "²", "32/8", "/6")
NONE = ("1", "x")
CASES = {
    "skip": Case(("skip@3,5",), ("", "1"), compute=True),
    "skip_uniform": Case(("skip_uniform:0.5",), SHARE, compute=True),
    "skip_importance": Case(("skip_importance:0.5",), SHARE, compute=True),
    "skip_gradient": Case(("skip_gradient:0.5",), SHARE, compute=True),
    "share": Case(("share:0.5",), SHARE),
    "refit": Case(("skip@3,5", "refit", "int8:16"), NONE, compute=True),
    "patch": Case(("skip@3,5", "patch"), NONE, compute=True),
    "narrow": Case(("narrow:0.5",), SHARE, compute=True),
    "lowrank": Case(("lowrank:0.5",), SHARE, compute=True, parallel=True),
    "center": Case(("gptq4:16", "center"), NONE, parallel=True),
    "distill": Case(("skip@3,5", "distill:4", "int8:16"), ("", "0", "-1", "x", "1.5"), compute=True),
    "prune": Case(("prune:0.5",), (*SHARE, "0.51"), parallel=True),
    "prune_2_4": Case(("prune_2_4",), NONE, parallel=True),
    "int8": Case(("int8:16",), GROUP, parallel=True),
    "int4": Case(("int4:16",), GROUP, parallel=True),
    "int3": Case(("int3:16",), GROUP, parallel=True),
    "gptq8": Case(("gptq8:16",), GROUP, parallel=True),
    "gptq4": Case(("gptq4:16",), GROUP, parallel=True),
    "gptq3": Case(("gptq3:16",), GROUP, parallel=True),
}
MIXES = (
    ("skip_importance:0.5", "int4:16"),
    ("int4:16", "skip_importance:0.5"),
    ("share:0.5", "narrow:0.5", "gptq4:16"),
    ("skip@4", "narrow:0.5", "patch", "gptq4:16"),
    ("lowrank:0.6", "int8:16"),
    ("prune_2_4", "int4:16"),
    ("narrow:0.5", "gptq4:16/6@2-4", "gptq3:16/6@5", "center"),
    ("lowrank:0.5", "int4:16/6", "center"),
    ("int4:16@2-3", "gptq3:16@4", "int8:16@5"),
)
IDS = torch.arange(48).reshape(4, 12) * 5 % 53
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(vocab_size=53, num_hidden_layers=8, tie_word_embeddings=True, use_cache=False, **LLAMA),
    "gpt2": GPT2Config(vocab_size=53, n_embd=32, n_layer=8, n_head=4, n_positions=16, use_cache=False),
}


def calibrate(model):
    for ids in IDS.split(2):
        model(input_ids=ids)


def losses(model):
    for ids in IDS.split(2):
        yield model(input_ids=ids, labels=ids).loss / 2


PUBLIC = Calibration(calibrate, losses)


@pytest.fixture(params=sorted(CONFIGS))
def model(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return (
            AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.bfloat16).eval().requires_grad_(False)
        )


@pytest.fixture(params=[*(case.recipe for case in CASES.values()), *MIXES], ids="+".join)
def recipe(request):
    return request.param


@pytest.fixture
def geometry(model):
    return Geometry.of(model, 2, 2)


@pytest.fixture
def middle(model, geometry):
    return Middle(MemorySource(model), geometry, PUBLIC)


def package(model, geometry, recipe, directory):
    return write_package(model, EmulatorDesign(geometry, recipe, "verbatim"), PUBLIC, directory)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def in_memory(model, geometry, recipe):
    """Returns the emulator without any file: a copy of the model with the recipe's segments."""
    middle = Middle(MemorySource(model), geometry, PUBLIC)
    emulator = copy.deepcopy(model).float()
    for draft in apply(middle, recipe, make_plan(middle, recipe)):
        for path, block in draft.blocks.items():
            emulator.set_submodule(path, block)
    return emulator


def test_every_entry_is_listed_here():
    assert CASES.keys() == COMPRESSORS.keys()


def test_what_is_not_the_middle_is_bit_exact(model, geometry, recipe, tmp_path):
    package(model, geometry, recipe, tmp_path / "p")
    mine, other = model.state_dict(), load(tmp_path / "p").state_dict()
    middle = tuple(f"{path}." for path in geometry.middle(model))
    outside = [name for name in mine if not name.startswith(middle)]
    assert len(outside) > 20
    assert all(torch.equal(mine[name], other[name]) for name in outside)


def test_names_and_places_never_move(model, geometry, recipe, tmp_path):
    package(model, geometry, recipe, tmp_path / "p")
    emulator = load(tmp_path / "p")
    for path in geometry.blocks(model):
        assert isinstance(emulator.get_submodule(path), type(model.get_submodule(path)))
    for path in geometry.slots(model):
        assert list(emulator.get_submodule(path).state_dict()) == list(model.get_submodule(path).state_dict())


def test_bytes_fall_and_compute_does_not_rise(model, geometry, recipe, tmp_path):
    whole = package(model, geometry, (), tmp_path / "whole")
    less = package(model, geometry, recipe, tmp_path / "less")
    assert less.shipped_bytes < whole.shipped_bytes
    assert less.middle_ratio < whole.middle_ratio == 1
    assert less.slot_bytes == whole.slot_bytes
    assert less.full_bytes == whole.full_bytes
    assert less.compute_ratio <= whole.compute_ratio == 1
    case = next((case for case in CASES.values() if case.recipe == recipe), None)
    assert case is None or (less.compute_ratio < 1) == case.compute


def test_loaded_equals_in_memory(model, geometry, recipe, tmp_path):
    """Outputs are equal up to fp16, since newly fitted weights are shipped in sixteen bits."""
    package(model, geometry, recipe, tmp_path / "p")
    emulator, expected = load(tmp_path / "p", dtype=torch.float32), in_memory(model, geometry, recipe)
    mine, theirs = emulator.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-6, msg=name)
    torch.testing.assert_close(logits(emulator), logits(expected), rtol=1e-2, atol=2e-3)


def test_the_same_input_gives_the_same_bytes(model, geometry, recipe, tmp_path):
    first, second = (package(model, geometry, recipe, tmp_path / name) for name in "ab")
    assert first.digest() == second.digest()


def test_a_site_accepts_the_structure(model, geometry, recipe, tmp_path):
    manifest = package(model, geometry, recipe, tmp_path / "p")
    check_structure(tmp_path / "p", load(tmp_path / "p", dtype=torch.float32), manifest)


def test_the_model_is_left_as_it_was(model, geometry, recipe, tmp_path):
    before = copy.deepcopy(model.state_dict())
    package(model, geometry, recipe, tmp_path / "p")
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_parallel_emulator_keeps_shapes_or_refuses(model, name, tmp_path):
    geometry = Geometry.of(model, 1, 0, "parallel")
    if not CASES[name].parallel:
        with pytest.raises(ConfigError, match=r"in a parallel emulator|blocks of a parallel emulator|places"):
            package(model, geometry, CASES[name].recipe, tmp_path / "p")
        return
    package(model, geometry, CASES[name].recipe, tmp_path / "p")
    emulator = load(tmp_path / "p")
    full, other = (
        {path: tuple(weight_of(m).shape) for path, m in one.named_modules() if is_linear(m)}
        for one in (model, emulator)
    )
    assert full == other


@pytest.mark.parametrize(("name", "argument"), [(name, bad) for name, case in CASES.items() for bad in case.refused])
def test_arguments_out_of_range_are_refused(model, geometry, middle, name, argument):
    recipe = (f"{name}:{argument}" if argument else name,)
    with pytest.raises(ConfigError, match=f"^{name}="):
        list(apply(middle, recipe, make_plan(middle, recipe)))


@pytest.mark.parametrize("places", ["", "x", "1-", "5-4", "2,", "99999999999", "0", "7", "2-9"])
def test_places_that_are_none_or_not_in_the_middle_are_refused(middle, places):
    with pytest.raises(ConfigError, match="step='int4:16@"):
        make_plan(middle, (f"int4:16@{places}",))


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_misspelt_name_is_answered_with_the_right_one(middle, name):
    with pytest.raises(UnknownName, match=f"compressor='{name}x'.*{name}"):
        make_plan(middle, (f"{name}x:1",))


@pytest.mark.parametrize("name", sorted(CASES))
def test_without_public_examples_it_works_or_says_what_is_missing(model, geometry, name, tmp_path):
    if all(not COMPRESSORS[step.partition(":")[0].partition("@")[0]].public for step in CASES[name].recipe):
        write_package(model, EmulatorDesign(geometry, CASES[name].recipe, "verbatim"), None, tmp_path / "p")
        return
    with pytest.raises(OffsiteError, match="calibration=None"):
        write_package(model, EmulatorDesign(geometry, CASES[name].recipe, "verbatim"), None, tmp_path / "p")
