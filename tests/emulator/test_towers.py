"""Towers and geometry are found by structure."""

import pytest
from torch import nn

from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.structure.towers import find_towers, main_tower, signature, usual_signature
from offsite.errors import ConfigError, UnknownName, UnsupportedModel

MAIN = {
    "llama_tied": "model.layers",
    "llama_untied": "model.layers",
    "mistral": "model.layers",
    "mixtral": "model.layers",
    "qwen3": "model.layers",
    "gemma3": "model.layers",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
    "bert": "encoder.layer",
    "bert_masked": "bert.encoder.layer",
    "modernbert": "model.layers",
    "t5": "decoder.block",
    "bart": "model.decoder.layers",
    "vit": "vit.layers",
    "bloom": "transformer.h",
    "qwen2": "model.layers",
    "phi": "model.layers",
    "falcon": "transformer.h",
    "roberta": "roberta.encoder.layer",
    "clip": "vision_model.encoder.layers",
    "llava": "model.language_model.layers",
    "dit": "transformer_blocks",
}


def block(width=4):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU())


def test_main_tower_of_every_family(family):
    tower = main_tower(family.model)
    assert tower.path == MAIN.get(family.name, tower.path)
    assert tower.blocks == tuple(f"{tower.path}.{i}" for i in range(len(family.model.get_submodule(tower.path))))
    assert len(tower.blocks) >= 5


def test_encoder_and_decoder_are_two_towers(make):
    assert [tower.path for tower in find_towers(make("t5").model)] == ["encoder.block", "decoder.block"]


def test_only_the_outermost_list_counts():
    model = nn.ModuleDict({"outer": nn.ModuleList(nn.Sequential(block(), block()) for _ in range(3))})
    assert [tower.path for tower in find_towers(model)] == ["outer"]


def test_one_block_may_own_more_but_not_half_of_them():
    odd = block()
    odd.add_module("table", nn.Embedding(3, 4))
    tower = nn.ModuleList([odd, block(), block()])
    assert usual_signature(list(tower)) == signature(tower[1])
    assert [found.path for found in find_towers(nn.ModuleDict({"a": tower}))] == ["a"]
    assert find_towers(nn.ModuleDict({"a": nn.ModuleList([odd, block()])})) == []


@pytest.mark.parametrize(
    "blocks",
    [
        [block()],
        [nn.Linear(4, 4), nn.Linear(4, 4)],
        [block(4), block(5)],
        [nn.Sequential(nn.ReLU(), nn.ReLU())] * 2,
        [nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU())],
        [block(), nn.ModuleList([nn.Linear(4, 4)])],
    ],
)
def test_what_is_no_tower(blocks):
    model = nn.ModuleDict({"list": nn.ModuleList(blocks)})
    assert find_towers(model) == []
    with pytest.raises(UnsupportedModel, match="no list of at least two alike blocks"):
        main_tower(model)


@pytest.mark.parametrize(("first", "last"), [(2, 2), (1, 0), (0, 1), (0, 4), (5, 0)])
def test_slots_and_middle_split_the_tower_in_order(llama, first, last):
    geometry = Geometry.of(llama.model, first, last)
    slots, middle = geometry.slots(llama.model), geometry.middle(llama.model)
    blocks = main_tower(llama.model).blocks
    assert slots[:first] + middle + slots[first:] == blocks
    assert len(slots) == first + last


@pytest.mark.parametrize(("first", "last"), [(3, 3), (6, 0), (7, 2)])
def test_no_middle_is_refused(llama, first, last):
    with pytest.raises(ConfigError, match=rf"first={first} last={last}.*6 blocks.*choose first \+ last < 6"):
        Geometry.of(llama.model, first, last).middle(llama.model)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (-1, 2), (2, -1)])
def test_geometry_without_slots_is_refused(first, last):
    with pytest.raises(ConfigError, match="first="):
        Geometry("model.layers", first, last)


def test_unknown_tower_names_the_nearest(llama):
    with pytest.raises(UnknownName, match=r"did you mean model\.layers"):
        Geometry("model.layer").slots(llama.model)
