"""A model read block by block from its shards gives the same package as the model in memory, with little memory."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.gradients import SlotGradients
from offsite.emulator.calibration.middle import Calibration, Middle
from offsite.emulator.calibration.source import MemorySource, ShardSource
from offsite.emulator.evaluation.fidelity import gradient_cosine
from offsite.emulator.package.package_reader import load
from offsite.emulator.structure.geometry import Geometry
from offsite.errors import DataError, UnsupportedModel

RECIPES = [("skip_gradient:0.34", "patch", "gptq4:16"), ("narrow:0.5", "int8:16"), ("share:0.5",)]


def saved(family, folder, shard="20KB"):
    family.model.save_pretrained(folder, max_shard_size=shard)
    return folder


def public(family):
    return Calibration(family.calibrate, family.losses)


@pytest.mark.parametrize("name", ["llama_tied", "llama_untied", "gpt2", "t5", "bert_masked", "opt", "vit"])
def test_shards_give_the_package_of_the_model_in_memory(make, name, tmp_path):
    family = make(name)
    source = ShardSource(saved(family, tmp_path / "m"), torch.float32)
    geometry = Geometry.of(family.model, 2, 1)
    for number, recipe in enumerate(RECIPES):
        mine = write_package(source, EmulatorDesign(geometry, recipe, "int8"), public(family), tmp_path / f"a{number}")
        other = family.build(tmp_path / f"b{number}", recipe, "int8")
        assert mine.tensors == other.tensors
        assert mine.to_dict() == other.to_dict()


def test_blocks_have_weights_only_while_they_are_open(llama, tmp_path):
    source = ShardSource(saved(llama, tmp_path / "m"), torch.float32)
    block = source.model.model.layers[3]
    assert all(parameter.is_meta for parameter in block.parameters())
    with source.open("model.layers.3") as opened:
        assert torch.equal(opened.mlp.up_proj.weight, llama.model.model.layers[3].mlp.up_proj.weight)
    assert all(parameter.is_meta for parameter in block.parameters())
    with source.passing():
        assert torch.equal(llama.run(source.model), llama.run(llama.model))
    assert all(parameter.is_meta for parameter in block.parameters())


def test_gradients_pass_through_blocks_that_come_and_go(llama, tmp_path):
    source = ShardSource(saved(llama, tmp_path / "m"), torch.float32)
    geometry = Geometry.of(llama.model, 1, 1)
    paths = geometry.middle(llama.model)[:2]
    mine = SlotGradients(Middle(source, geometry, public(llama))).damage(paths)
    other = SlotGradients(Middle(MemorySource(llama.model), geometry, public(llama))).damage(paths)
    assert mine == pytest.approx(other, abs=1e-6)
    assert mine > 1e-3


def test_what_stands_in_a_place_has_its_own_weights(llama, tmp_path):
    source = ShardSource(saved(llama, tmp_path / "m"), torch.float32)
    geometry = Geometry.of(llama.model, 1, 1)
    changed = copy.deepcopy(llama.model.model.layers[2])
    changed.mlp.down_proj = torch.nn.Linear(48, 32)
    stand_ins = {"model.layers.2": changed.requires_grad_(False)}
    mine = SlotGradients(Middle(source, geometry, public(llama))).damage_of(stand_ins)
    other = SlotGradients(Middle(MemorySource(llama.model), geometry, public(llama))).damage_of(stand_ins)
    assert mine == pytest.approx(other, abs=1e-6)


def test_the_gate_works_on_shards(llama, tmp_path):
    from offsite.adapter.spec import AdapterSpec

    source = ShardSource(saved(llama, tmp_path / "m"), torch.float32)
    geometry = Geometry.of(llama.model, 1, 1)
    llama.build(tmp_path / "p", ("int4:16",))
    spec = AdapterSpec(slots=geometry.slots(llama.model))
    source.keep(spec.slots)
    emulator = load(tmp_path / "p")
    with source.passing():
        mine = gradient_cosine(source.model, emulator, spec, llama.losses)
    assert mine == pytest.approx(gradient_cosine(llama.model, emulator, spec, llama.losses), abs=1e-9)


def test_a_folder_that_is_no_model_or_not_the_whole_one(llama, tmp_path):
    with pytest.raises(DataError, match="give a model folder"):
        ShardSource(tmp_path, torch.float32)
    folder = saved(llama, tmp_path / "m", shard="1GB")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"llama"', '"nothing"'))
    with pytest.raises(UnsupportedModel, match="does not know its model_type"):
        ShardSource(folder, torch.float32)
    whole = saved(llama, tmp_path / "n", shard="20KB")
    index = (whole / "model.safetensors.index.json").read_text()
    (whole / "model.safetensors.index.json").write_text(index.replace("model.norm.weight", "model.nrm.weight"))
    with pytest.raises(UnsupportedModel, match=r"tensor=model\.norm.weight is not in the checkpoint"):
        ShardSource(whole, torch.float32)
    (whole / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(DataError, match="not an index of shards"):
        ShardSource(whole, torch.float32)


MEASURE = """
import resource, sys, torch
from pathlib import Path
from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.source import ShardSource

ids = torch.arange(16).reshape(2, 8)
source = ShardSource(Path(sys.argv[1]), torch.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
design = EmulatorDesign(Geometry.of(source.model, 1, 1), ("skip@3-9", "patch", "int4:64"), "verbatim")
write_package(source, design,
      Calibration(lambda model: model(input_ids=ids)), Path(sys.argv[2]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(peak - before)
"""


def test_peak_memory_is_a_few_blocks_and_not_the_model(tmp_path):
    """Twenty-four blocks of 12.6 MB in float32; streaming holds a few of them."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=24, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "m", max_shard_size="30MB")
    whole = sum(parameter.numel() * 4 for parameter in model.parameters())
    block = sum(parameter.numel() * 4 for parameter in model.model.layers[0].parameters())
    del model
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "m"), str(tmp_path / "p")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    grown = int(done.stdout.strip().splitlines()[-1])
    assert whole > 20 * block
    assert grown < 10 * block, f"grown {grown / 1e6:.0f} MB, model {whole / 1e6:.0f} MB, block {block / 1e6:.0f} MB"
