"""Training steps on a device: private against plain and against Opacus, and on an emulator against the full model.

The sections `step` and `emulator` of `bench/gpu.py`. All ways of a section run in turn in one process; times are of the
wall, with the device waited for, and memory is the rise of the device's peak over what was held before the step.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench import dp_step
from bench.emulator_cost import BILLION, TARGETS
from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.package.package_reader import load, read_manifest
from offsite.emulator.structure.geometry import Geometry, slot_paths
from offsite.task.device_memory import has_allocator, peak_of
from offsite.task.examples import Examples
from offsite.task.tasks import TASKS

RECIPE = ("skip_uniform:0.5", "int4:64")
TOY = {**BILLION, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
TOY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
Step = Callable[[], None]


def private_steps(device: torch.device, *, small: bool) -> dict[str, Any]:
    """Returns seconds and peak of a step of each way of `bench/dp_step.py`, and their ratios to the plain step."""
    rounds, result = (2 if small else 8), dict[str, Any]()
    for adapter in dp_step.ADAPTERS:
        subjects = {}
        for attached in (True, False):
            model, task, examples = dp_step.subject("", adapter, attached=attached, shape=TOY if small else BILLION)
            subjects[attached] = model.to(device), task, examples.to(device)
        cases = {way: (dp_step.maker(way), subjects[way in dp_step.OURS]) for way in (*dp_step.WAYS, "ew")}
        result[adapter] = compared(cases, device, rounds, base="plain")
        del subjects, cases
        empty(device)
    return result


def compared(cases: dict[str, Any], device: torch.device, rounds: int, *, base: str) -> dict[str, Any]:
    """Runs the steps of all cases in turn; a case that fails has the first line of its error in place of numbers.

    Args:
      cases: function that makes a step, and its arguments (model, task, examples), by name.
      device: device of the models.
      rounds: timed rounds, after one to warm up.
      base: case that the ratios divide by.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    peaks, failed = dict[str, int](), dict[str, str]()
    for number in range(rounds + 1):
        for name, (make, subject) in cases.items():
            if name in failed:
                continue
            try:
                spent, peak = measured(make, subject, device)
            except Exception as error:  # stock Opacus does not know every layer
                failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
                continue
            if number:
                seconds[name].append(spent)
                peaks[name] = max(peaks.get(name, 0), peak)
    middle = {name: statistics.median(of) for name, of in seconds.items() if of and name not in failed}
    return {
        "seconds": {name: round(value, 5) for name, value in middle.items()},
        "time": {name: round(value / middle[base], 3) for name, value in middle.items()},
        "peak_mb": {name: round(peaks[name] / 2**20, 1) for name in middle},
        "memory": {name: round(peaks[name] / max(peaks[base], 1), 3) for name in middle},
        "failed": failed,
    }


def measured(make: Callable[..., Step], subject: tuple[Any, Any, Any], device: torch.device) -> tuple[float, int]:
    """Returns the seconds of one step, and the rise of the peak of memory over what was held before it, bytes."""
    with ExitStack() as stack:
        stack.callback(lambda: subject[0].zero_grad(set_to_none=True))
        step = make(*subject, stack)
        held = int(torch.accelerator.memory_allocated(device)) if has_allocator(device) else 0
        began = time.perf_counter()
        with peak_of(device) as peak:  # waits for the device at both ends
            step()
        return time.perf_counter() - began, peak.bytes - held


def emulator_steps(device: torch.device, folder: Path, *, small: bool) -> dict[str, Any]:
    """Returns seconds and memory of a private step on an emulator over LoRA on all layers of the full model.

    Both have 16-bit weights where the device computes with them, and the same batch. Memory counts the weights.
    """
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    full = random_model(TOY if small else BILLION, device, dtype)
    batch, length = (2, 16) if small else (8, 512)
    ids = torch.randint(full.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
    design = EmulatorDesign(Geometry.of(full, 1, 1), RECIPE, "int4")
    write_package(full, design, Calibration(lambda model: model(input_ids=ids[:1])), folder / "package")
    examples, rounds = Examples(ids, torch.ones_like(ids)), 2 if small else 8
    result = {"dtype": str(dtype), "tokens": [batch, length], "recipe": list(RECIPE)}
    result["full"] = compared({"lora": (peer, (full, TASKS["causal_lm"], examples))}, device, rounds, base="lora")
    result["full"]["weights_mb"] = weights(full)
    del full
    empty(device)
    model, manifest = load(folder / "package", dtype=dtype).to(device), read_manifest(folder / "package")
    slots, _ = slot_paths(model, manifest.geometry)
    model = attach(model, AdapterSpec("lora", rank=8, alpha=16.0, targets=TARGETS, slots=slots))
    cases = {way: (dp_step.maker(way), (model, TASKS["causal_lm"], examples)) for way in ("plain", "bookkeeping")}
    result["emulator"] = compared(cases, device, rounds, base="plain")
    result["emulator"]["weights_mb"] = weights(model)
    if "lora" in result["full"]["seconds"] and "bookkeeping" in result["emulator"]["seconds"]:
        result["time"] = result["emulator"]["seconds"]["bookkeeping"] / result["full"]["seconds"]["lora"]
        ours, theirs = (
            part["peak_mb"][name] + (part["weights_mb"] if has_allocator(device) else 0)  # a CPU's peak has them
            for part, name in ((result["emulator"], "bookkeeping"), (result["full"], "lora"))
        )
        result["memory"] = ours / theirs
    return result


def random_model(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Returns a Llama of random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**shape, use_cache=False)).eval()
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def peer(model: Any, task: Any, examples: Any, stack: ExitStack) -> Step:
    """Returns a plain step of PEFT's LoRA on every dense layer of the full model, with Adam."""
    from peft import LoraConfig, get_peft_model

    wrapped: Any = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS)))
    stack.callback(wrapped.unload)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        wrapped(input_ids=examples.input_ids, labels=examples.input_ids).loss.backward()
        optimizer.step()

    return step


def weights(model: Any) -> float:
    """Returns the size of a model's parameters, MB."""
    return round(sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20, 1)


def empty(device: torch.device) -> None:
    """Gives memory that nothing uses back to the device."""
    if has_allocator(device):
        torch.accelerator.empty_cache()
