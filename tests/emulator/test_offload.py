"""A model whose blocks rest in 16 bits in mapped files computes, bit for bit, what the whole float32 model computes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach, dummy_tensors
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.evaluation.fidelity import visiting
from offsite.emulator.runtime.offload import OffloadedModel, call_of
from offsite.emulator.structure.denoisers import is_diffusion
from offsite.emulator.structure.geometry import Geometry
from offsite.task.mapped_weights import mapped_weights
from offsite.task.tasks import TASKS
from tests.task_samples import SAMPLES, first_of

CPU, HALF, WIDE = torch.device("cpu"), torch.bfloat16, torch.float32
# A method of each way to hang on the slots' own weights: beside, in the place of, made of, copied, outside, in front.
FAMILIES = ("gpt2", "gemma2", "bert", "t5", "clip", "llava", "dit", "unet")
CASES = [next(sample for sample in SAMPLES if sample.family == family) for family in FAMILIES]
METHODS = ("lora", "dora", "blocks", "norm", "masked", "head", "soft_prompt", "bottleneck")


def in_half(sample, folder):
    """Saves a sample's model in bfloat16, and returns the folder."""
    TASKS[sample.task].load(sample.save(folder / "wide"), dtype=HALF).save_pretrained(folder / "half")
    sample.save_processor(folder / "half")
    return folder / "half"


def both_ways(task, folder):
    """Returns the whole float32 model, and the model of which one block at a time is float32."""
    offloaded = OffloadedModel(task.load(folder, dtype=HALF), CPU)
    offloaded.compute_in(WIDE)
    return task.load(folder, dtype=HALF).float(), offloaded


def examples(sample, folder, model):
    task, processor = TASKS[sample.task], TASKS[sample.task].load_processor(folder)
    length, config = sample.length, model.config
    return task.encode(processor, sample.records(3, 1), length=length, split="truncate", model_config=config)


def gradients(task, model, batch):
    trained = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    loss = task.losses(model, batch).sum()
    return [loss, *torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)]


def resident(tensors):
    """Returns the resident bytes of the mapping in which some tensors lie."""
    address, inside, sizes = tensors[0].data_ptr(), False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "Rss:":
            sizes.append(int(line.split()[1]) * 1024)
    return sum(sizes)


@pytest.mark.parametrize("sample", CASES, ids=str)
def test_losses_scores_and_gradients_of_every_family_are_the_whole_models(sample, tmp_path):
    folder, task = in_half(sample, tmp_path), TASKS[sample.task]
    whole, offloaded = both_ways(task, folder)
    batch = examples(sample, folder, whole)
    spec = AdapterSpec(slots=Geometry.of(whole, 1, 0).slots(whole), targets=sample.targets)
    assert task.tally(offloaded.model, batch) == task.tally(whole, batch)
    diffuses = is_diffusion(whole)
    mine, other = offloaded.attach(spec), attach(whole, spec)
    assert Layout.of(mine) == Layout.of(other)
    for left, right in zip(gradients(task, mine, batch), gradients(task, other, batch), strict=True):
        assert torch.equal(left, right)
    resting = [one for module in mine.modules() if call_of(module) for one in module.named_parameters()]
    assert {p.dtype for name, p in resting if ".lora_" not in name} == (set() if diffuses else {HALF})


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_adapter_finds_the_weights_that_it_is_made_of(method, tmp_path):
    sample = first_of("causal_lm")
    folder, task = in_half(sample, tmp_path), TASKS[sample.task]
    whole, offloaded = both_ways(task, folder)
    batch = examples(sample, folder, whole)
    spec = AdapterSpec(method, slots=Geometry.of(whole, 1, 0).slots(whole))
    given = dummy_tensors(whole, spec)
    plain = task.tally(offloaded.model, batch)
    with visiting(offloaded.model, spec, given) as mine, visiting(whole, spec, given) as other:
        for left, right in zip(gradients(task, mine, batch), gradients(task, other, batch), strict=True):
            assert torch.equal(left, right)
    assert task.tally(offloaded.model, batch) == plain
    mine, other = offloaded.attach(spec, given), attach(whole, spec, given)
    layout = Layout.of(other)
    start = layout.read(other)
    assert (layout.read(mine) == start).all()
    moved = start + 0.01 * torch.randn(layout.size, generator=torch.Generator().manual_seed(0)).numpy()
    layout.write(mine, moved)
    layout.write(other, moved)
    for left, right in zip(gradients(task, mine, batch), gradients(task, other, batch), strict=True):
        assert torch.equal(left, right)


def test_weights_in_mapped_files_leave_memory_and_keep_their_values(tmp_path):
    values, other = torch.randn(1024, 1024), torch.randn(1024, 1024)
    save_file({"weight": values}, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")["weight"]
    (kept,) = mapped_weights([stored, other]).tensors
    assert kept.data_ptr() == stored.data_ptr()
    assert torch.equal(stored, values)
    before = resident([stored])
    mapped_weights([stored, other]).give_back()
    assert resident([stored]) < before / 2
    assert torch.equal(stored, values)


@pytest.mark.parametrize(("stored", "computed"), [(WIDE, HALF), (HALF, HALF), (torch.float16, HALF)])
def test_a_format_that_is_not_wider_is_taken_once(stored, computed, tmp_path):
    sample = first_of("causal_lm")
    task, folder = TASKS[sample.task], sample.save(tmp_path)
    offloaded = OffloadedModel(task.load(folder, dtype=stored), CPU)
    offloaded.compute_in(computed)
    whole = task.load(folder, dtype=stored)
    for tensor in whole.state_dict(keep_vars=True).values():
        tensor.data = tensor.data.to(computed)
    batch, spec = examples(sample, folder, whole), AdapterSpec(slots=Geometry.of(whole, 1, 0).slots(whole))
    mine, other = offloaded.attach(spec), attach(whole, spec)
    for left, right in zip(gradients(task, mine, batch), gradients(task, other, batch), strict=True):
        assert torch.equal(left, right)


def test_no_weight_is_left_ready_after_an_error(tmp_path):
    sample = first_of("causal_lm")
    task = TASKS[sample.task]
    _, offloaded = both_ways(task, in_half(sample, tmp_path))
    block = next(module for module in offloaded.model.modules() if call_of(module))
    with pytest.raises(TypeError):
        block(nothing=1)
    assert {parameter.dtype for parameter in block.parameters()} == {HALF}
