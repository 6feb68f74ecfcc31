"""What every entry of COMPRESSORS promises; a new entry needs one line in CASES and nothing else."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from emulator.compressors import COMPRESSORS, Middle, make_plan
from emulator.geometry import Geometry
from emulator.package import build, load
from emulator.quantize import dequantize, quantize
from emulator.skip import skipped
from emulator.storage import parse
from errors import ConfigError, OffsiteError, UnknownName

# name -> (a usual argument, arguments that must be refused)
CASES = {
    "skip_uniform": ("0.5", ["", "0", "-0.1", "1.01", "x", "nan", "1/0"]),
    "skip_importance": ("0.5", ["", "0", "-0.1", "1.01", "x", "nan", "1/0"]),
    "int8": ("16", ["0", "1", "-4", "x", "4097", "1.5", "²"]),
    "int4": ("16", ["0", "1", "-4", "x", "4097", "1.5", "²"]),
}
IDS = torch.arange(24).reshape(2, 12) % 53
MIXED = ("skip_importance:0.5", "int4:16")


def calibrate(model):
    model(input_ids=IDS)


@pytest.fixture
def model():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=53, num_hidden_layers=8, tie_word_embeddings=True, use_cache=False, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


@pytest.fixture(
    params=[*((f"{name}:{usual}",) for name, (usual, _) in CASES.items()), MIXED, MIXED[::-1]], ids="+".join
)
def recipe(request):
    return request.param


@pytest.fixture
def geometry(model):
    return Geometry.of(model, 2, 2)


def package(model, geometry, recipe, directory):
    return build(model, geometry, recipe, "verbatim", calibrate, directory)


def in_memory(model, plan, forms):
    """The emulator as the plan says, without any file: codes there and back, blocks replaced."""
    emulator = copy.deepcopy(model)
    for name, how in plan.storage.items():
        weight = emulator.get_parameter(name)
        bits, group = parse(how)
        weight.copy_(dequantize(quantize(weight, bits, group), tuple(weight.shape), bits, group))
    for path in plan.skipped:
        emulator.set_submodule(path, skipped(emulator.get_submodule(path), forms[path]))
    return emulator


def test_every_entry_is_listed_here():
    assert CASES.keys() == COMPRESSORS.keys()


def test_slots_and_what_lies_outside_the_tower_are_bit_exact(model, geometry, recipe, tmp_path):
    package(model, geometry, recipe, tmp_path / "p")
    emulator = load(tmp_path / "p")
    for path in (*geometry.slots(model), "model.norm", "model.embed_tokens", "lm_head"):
        mine, other = model.get_submodule(path).state_dict(), emulator.get_submodule(path).state_dict()
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_names_never_move(model, geometry, recipe, tmp_path):
    manifest = package(model, geometry, recipe, tmp_path / "p")
    emulator = load(tmp_path / "p")
    left_out = tuple(f"{path}." for path in manifest.skipped)
    assert list(emulator.state_dict()) == [n for n in model.state_dict() if not n.startswith(left_out)]
    assert len(emulator.model.layers) == len(model.model.layers)
    for path, block in model.model.layers.named_children():
        assert isinstance(emulator.model.layers.get_submodule(path), type(block))


def test_bytes_fall(model, geometry, recipe, tmp_path):
    whole = package(model, geometry, (), tmp_path / "whole")
    less = package(model, geometry, recipe, tmp_path / "less")
    assert less.shipped_bytes < whole.shipped_bytes
    assert less.middle_ratio < whole.middle_ratio == 1
    assert less.slot_bytes == whole.slot_bytes
    assert less.full_bytes == whole.full_bytes


def test_loaded_equals_in_memory(model, geometry, recipe, tmp_path):
    package(model, geometry, recipe, tmp_path / "p")
    middle = Middle(model, geometry, calibrate)
    forms = {path: seen.form for path, seen in middle.observations.items()}
    expected, emulator = in_memory(model, make_plan(middle, recipe), forms), load(tmp_path / "p")
    theirs, mine = expected.state_dict(), emulator.state_dict()
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[name], mine[name]) for name in theirs)
    with torch.no_grad():
        assert torch.equal(emulator(input_ids=IDS).logits, expected(input_ids=IDS).logits)


def test_plans_touch_the_middle_only(model, geometry, recipe):
    plan = make_plan(Middle(model, geometry, calibrate), recipe)
    blocks = tuple(f"{path}." for path in plan.kept)
    assert set(plan.actions) == set(geometry.middle(model))
    assert all(name.startswith(blocks) for name in plan.storage)


@pytest.mark.parametrize(("name", "argument"), [(name, bad) for name, (_, many) in CASES.items() for bad in many])
def test_arguments_out_of_range_are_refused(model, geometry, name, argument):
    with pytest.raises(ConfigError, match=f"^{name}="):
        make_plan(Middle(model, geometry, calibrate), (f"{name}:{argument}",))


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_misspelt_name_is_answered_with_the_right_one(model, geometry, name):
    with pytest.raises(UnknownName, match=f"compressor='{name}x'.*{name}"):
        make_plan(Middle(model, geometry, calibrate), (f"{name}x:1",))


def test_skip_without_public_examples_is_refused(model, geometry, tmp_path):
    for name in ("skip_uniform:0.5", "skip_importance:0.5"):
        with pytest.raises(OffsiteError, match="calibration=None"):
            build(model, geometry, (name,), "verbatim", None, tmp_path / name[:9])
    build(model, geometry, ("int4",), "verbatim", None, tmp_path / "codes")


@pytest.mark.parametrize(("fraction", "chosen"), [("0.25", [4]), ("0.5", [3, 5]), ("1", [2, 3, 4, 5]), ("0.01", [4])])
def test_uniform_skips_are_spaced_evenly(model, geometry, fraction, chosen):
    plan = make_plan(Middle(model, geometry, calibrate), (f"skip_uniform:{fraction}",))
    assert list(plan.skipped) == [f"model.layers.{index}" for index in chosen]


def test_importance_skips_the_least_influential(model, geometry):
    # a block whose two output projections are zero returns its input: influence 0
    for index in (3, 4):
        model.model.layers[index].self_attn.o_proj.weight.zero_()
        model.model.layers[index].mlp.down_proj.weight.zero_()
    plan = make_plan(Middle(model, geometry, calibrate), ("skip_importance:0.5",))
    assert plan.skipped == ("model.layers.3", "model.layers.4")


def test_a_block_the_others_depend_on_is_never_skipped(model):
    model.model.layers[3].add_module("table", torch.nn.Embedding(2, 2))
    plan = make_plan(Middle(model, Geometry.of(model, 1, 1), calibrate), ("skip_uniform:1",))
    assert plan.kept == ("model.layers.3",)


def test_the_later_of_two_quantisers_wins_and_a_second_skip_takes_of_what_is_left(model, geometry):
    middle = Middle(model, geometry, calibrate)
    assert set(make_plan(middle, ("int4:16", "int8:32")).storage.values()) == {"int8:32"}
    assert len(make_plan(middle, ("skip_uniform:0.5", "skip_importance:0.5")).kept) == 1
    with pytest.raises(OffsiteError, match="no block of the middle is left"):
        make_plan(middle, ("skip_uniform:1", "skip_uniform:1"))
