"""The search against every possible combination, on a model that is small enough to try them all."""

import itertools

import pytest
import torch
import transformers as hf

from offsite.emulator.build.cost import SizeLimits
from offsite.emulator.build.ladder import LADDERS
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.build.search import Search
from offsite.emulator.calibration.middle import Calibration, Middle
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.calibration.source import MemorySource, ShardSource
from offsite.emulator.structure.geometry import Geometry
from offsite.errors import ConfigError
from offsite.task.examples import Examples
from offsite.task.tasks import TASKS
from tests.emulator.conftest import CAUSAL, _causal

IDS = (torch.arange(8 * 16).reshape(8, 16) * 7 + torch.arange(8).unsqueeze(1)) % 61


@pytest.fixture
def middle():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = _causal(hf.LlamaConfig(**CAUSAL, use_cache=False)).eval().requires_grad_(False)
    public = PublicExamples(TASKS["causal_lm"], Examples(IDS, torch.ones_like(IDS)), gradients=2)
    source = MemorySource(model)
    return Middle(source, Geometry.of(model, 2, 1), Calibration(public.run, public.losses))


def every_choice(search):
    """Yields (damage, fits) of every combination of rungs."""
    paths = list(search._rungs)
    for levels in itertools.product(*(search._rungs[path] for path in paths)):
        search._at = dict(zip(paths, levels, strict=True))
        if not search._excess():
            yield search._damage()


@pytest.mark.parametrize("flops", [0.4, 0.75])
def test_a_search_comes_near_the_best_of_all_combinations(middle, flops):
    search = Search(middle, SizeLimits(flops=flops), "verbatim")
    found = search.run()
    chosen = found[-1]
    assert chosen.fits
    assert chosen.flops <= flops
    damages = sorted(every_choice(search))
    # The search need not find the best, but must come near: of the best tenth, or within a tenth of the least damage.
    assert chosen.damage <= max(damages[len(damages) // 10], 1.1 * damages[0])
    assert chosen.damage <= min(one.damage for one in found if one.fits) + 1e-6


def test_the_last_candidate_is_what_its_recipe_says(middle):
    found = Search(middle, SizeLimits(flops=0.75), "verbatim").run()
    assert len(found) == 1 + len(LADDERS["sandwich"].states())
    assert found[0].damage < 0.01  # all blocks at the top of the ladder
    assert [one.fits for one in found][:2] == [False, False]


@pytest.mark.parametrize("rounded", [False, True])
def test_bytes_of_a_candidate_are_those_of_its_package(middle, tmp_path, rounded):
    """A bf16 checkpoint is shipped as bf16, also where it was loaded as float32."""
    model = middle.source.model
    if rounded:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
    model.save_pretrained(tmp_path / "model")
    shards = Middle(ShardSource(tmp_path / "model", torch.float32), middle.geometry, middle.calibration)
    found = Search(middle, SizeLimits(flops=0.75), "int8").run()
    assert [one.cost for one in Search(shards, SizeLimits(flops=0.75), "int8").run()] == [one.cost for one in found]
    for one in found[::3]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        manifest = write_package(model, EmulatorDesign(middle.geometry, one.recipe, "int8"), middle.calibration, folder)
        assert manifest.payload_bytes == one.cost.bytes


def test_limits_that_nothing_meets_are_refused(middle):
    with pytest.raises(ConfigError, match="max_bytes: the smallest emulator has"):
        Search(middle, SizeLimits(bytes=100), "verbatim").run()
