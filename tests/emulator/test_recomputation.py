"""Recomputation of frozen blocks: less is kept, and each engine gives the same gradients to the last bit."""

import pytest
import torch

from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.package.package_reader import load
from offsite.emulator.runtime.recomputation import frozen_blocks, kept_bytes, recompute_blocks
from offsite.emulator.runtime.refresh import plain_of
from offsite.emulator.runtime.stored_model import holding
from offsite.emulator.structure.geometry import Geometry
from offsite.privacy.batches import trainable
from offsite.privacy.engines import ENGINES
from offsite.privacy.probe import probe, single_gradient
from offsite.task.causal_lm import CausalLM
from offsite.task.examples import Examples

TASK = CausalLM()


def examples():
    ids = torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(4))
    return Examples(ids, (torch.arange(9) < torch.tensor([9, 4, 7])[:, None]).long())


@pytest.fixture
def adapted(make, tmp_path):
    """A function that opens one package with an adapter, and returns the model and the paths of its blocks."""
    family = make("llama_tied")
    family.build(tmp_path / "p", ("int4:16",), "int8")
    geometry = Geometry.of(family.model, 2, 1)
    blocks, slots = geometry.blocks(family.model), geometry.ends(family.model)
    spec = AdapterSpec("lora", rank=2, targets=("q_proj", "down_proj"), slots=slots)

    def opened():
        model = attach(load(tmp_path / "p", dtype=torch.float32, hold=holding("stored", spec)), spec)
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.add_(0.05)
        return model, blocks

    return opened


@pytest.mark.parametrize("engine", list(ENGINES))
def test_each_engine_gives_the_same_bits(adapted, engine):
    rows = []
    for again in (False, True):
        model, blocks = adapted()
        if again:
            recompute_blocks(frozen_blocks(plain_of(model), blocks))
            probe(model, TASK.losses, examples(), engine)
        with ENGINES[engine](model) as running:
            rows.append([single_gradient(model, TASK.losses, examples(), running, row) for row in range(3)])
    for plain, found in zip(*rows, strict=True):
        assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_frozen_blocks_keep_their_inputs_only(adapted):
    model, blocks = adapted()
    frozen = frozen_blocks(plain_of(model), blocks)
    assert [plain_of(model).get_submodule(path) in frozen for path in blocks] == [False] * 2 + [True] * 3 + [False]

    def run():
        return TASK.losses(model, examples())

    before = kept_bytes(frozen, run)
    recompute_blocks(frozen)
    hidden = 3 * 9 * plain_of(model).config.hidden_size * 4
    assert before > 8 * hidden * len(frozen)
    assert kept_bytes(frozen, run) <= 4 * hidden * len(frozen)
