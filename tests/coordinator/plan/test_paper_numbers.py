"""A plan on paper against the real thing: bytes of written packages, opened weights, and runs on real tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.coordinator.plan.meta_run import MetaRun
from offsite.coordinator.plan.model_outline import Outline, outline_of
from offsite.coordinator.plan.paper_package import Design, make_package
from offsite.coordinator.plan.site_phases import Site
from offsite.coordinator.plan.trial import Batches, Trials, try_emulator, try_full
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.package import package_reader
from offsite.emulator.runtime.quantized_linear import bytes_of
from offsite.emulator.runtime.stored_model import holding
from offsite.emulator.structure.geometry import Geometry
from offsite.privacy.engines import ENGINES
from offsite.task.causal_lm import CausalLM

CONFIG = hf.LlamaConfig(
    hidden_size=64, intermediate_size=192, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=300, use_cache=False,
)  # fmt: skip
IDS = (torch.arange(64).reshape(4, 16) * 7) % 300
RECIPES = [
    ("int4:64",), ("gptq4:32/6",), ("int8:128",), ("narrow:0.33", "gptq4:64"), ("lowrank:0.5", "int8:32"),
    ("skip_uniform:0.5", "int4:64"), ("skip@2,3", "int8:64"), ("share:0.5", "int4:64"), ("int4:64@2-4",), (),
]  # fmt: skip
SPEC = AdapterSpec("ffa_lora", rank=4, alpha=8.0)
TASK = CausalLM()


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made = hf.LlamaForCausalLM(CONFIG).requires_grad_(False).eval()
    for parameter in made.parameters():
        parameter.copy_(parameter.bfloat16())
    return made


@pytest.fixture(scope="module")
def outline() -> Outline:
    with torch.device("meta"):
        return outline_of(hf.LlamaForCausalLM(CONFIG), TASK, torch.bfloat16, "tiny")


def write(model: Any, recipe: tuple[str, ...], folder: Path) -> Any:
    run = Calibration(lambda other: other(input_ids=IDS))
    return write_package(model, EmulatorDesign(Geometry.of(model), recipe, "int8"), run, folder)


@pytest.mark.parametrize("recipe", RECIPES, ids=" ".join)
def test_bytes_on_paper_are_those_of_the_written_package(
    recipe: tuple[str, ...], model: Any, outline: Outline, tmp_path: Path
) -> None:
    facts = write(model, recipe, tmp_path / "package")
    package = make_package(outline, Design(recipe=recipe))
    # A fit may add biases, two bytes for each channel.
    assert facts.payload_bytes == pytest.approx(package.bytes, rel=5e-3)
    assert facts.compute_ratio == pytest.approx(package.compute)


def test_weights_in_a_sites_memory_are_those_of_the_opened_emulator(
    model: Any, outline: Outline, tmp_path: Path
) -> None:
    write(model, ("int4:64",), tmp_path / "package")
    package, slots = make_package(outline, Design()), Geometry.of(model).slots(model)
    widened, stored = (
        Site(package, Trials.none(), stored=how, batch=1, physical=1, steps=1, sites=3) for how in (0, 1)
    )
    opened = package_reader.load(tmp_path / "package", dtype=torch.float32)
    assert sum(p.nbytes for p in opened.parameters()) == widened.resident
    hold = holding("stored", AdapterSpec("ffa_lora", rank=4, alpha=8.0, slots=slots))
    held = bytes_of(package_reader.load(tmp_path / "package", dtype=torch.float32, hold=hold))
    assert held == stored.resident < widened.resident


def step(model: Any, batch: Any) -> None:
    with ENGINES["bookkeeping"](model) as engine:
        engine.add(TASK.losses, batch, lambda norms, positions: torch.ones_like(norms))


def test_a_step_without_values_takes_what_a_step_with_values_takes(model: Any, outline: Outline) -> None:
    """The meta run of the whole depth comes from one and two blocks; here all blocks compute."""
    import copy

    package = make_package(outline, Design())
    trials = try_full(package, SPEC, Batches(length=16, physical=4))
    slots = Geometry.of(model).slots(model)
    real = attach(copy.deepcopy(model), AdapterSpec("ffa_lora", rank=4, alpha=8.0, slots=slots)).eval()
    batch = TASK.dummy_batch(real, 16, seed=0).select([0, 0, 0, 0])
    step(real, batch)  # the task tries the head once
    with MetaRun.on(real) as run:
        step(real, batch)
    assert trials.step.peak == pytest.approx(run.work.peak, rel=0.02)
    assert trials.step.flops == pytest.approx(run.work.flops, rel=0.02)
    assert trials.upload == Layout.of(real).size
    with FlopCounterMode(display=False) as counter:
        step(real, batch)
    assert trials.step.flops == pytest.approx(counter.get_total_flops(), rel=0.1)  # without CPU attention


def test_the_peak_of_a_run_is_the_sum_of_what_lives() -> None:
    weight = torch.empty(256, 512, device="meta")
    with MetaRun([weight]) as run:
        first = torch.empty(64, 512, device="meta")
        second = first @ weight.T
        del first
        third = second.relu()
        fourth = third.view(256, 64)
    assert run.work.peak == 4 * (64 * 512 + 64 * 256)
    assert run.work.flops == 2 * 64 * 512 * 256
    assert fourth.shape == (256, 64)


def test_codes_that_are_widened_take_more_traffic_and_about_as_many_products(outline: Outline) -> None:
    package = make_package(outline, Design())
    plain, stored = (try_emulator(package, SPEC, Batches(16, 2), stored=how) for how in (False, True))
    assert stored.step.flops == pytest.approx(plain.step.flops, rel=0.1)  # the head is not chunked
    assert stored.step.traffic > plain.step.traffic
    assert stored.upload == plain.upload
