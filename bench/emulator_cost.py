"""The cost of a site's training step on an emulator, relative to LoRA on all blocks of the full model, same batch.

`python -m bench.emulator_cost --packages PACKAGE...` runs each case in processes of its own, in turn, and prints JSON:
peak resident memory and CPU seconds of one step. The peer is the usual way without offsite: PEFT LoRA on every dense
layer of the full model, transformers' own loss, Adam, float32. `--billion` takes random weights in the shape of a model
of 1.1 billion parameters, for memory and time only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = Path.home() / ".cache/offsite/models/smollm2-135m-instruct"
ROUNDED = ("int8", "nf4")  # private, with the middle's dense layers rounded by bitsandbytes, an optional extra
WAYS = ("peer", "plain", "private", "held")  # "held" is private with frozen layers as the package stores them
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BILLION = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


def peer(folder: Path, batch: int, length: int, steps: int) -> dict[str, Any]:
    """Returns time and memory of steps of PEFT's LoRA on the full model."""
    import torch
    from peft import LoraConfig, get_peft_model

    from offsite.task.tasks import TASKS

    model: Any = TASKS["causal_lm"].load(folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS)))
    ids = _ids(model.config.vocab_size, batch, length)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return _timed(step, steps)


def site(package: Path, batch: int, length: int, steps: int, way: str) -> dict[str, Any]:
    """Returns time and memory of a site's steps on an emulator, with per-example gradients unless the way is "plain".

    Args:
      package: folder of the emulator's package.
      batch: records in a step.
      length: tokens in a record.
      steps: number of timed steps.
      way: a way of `ROUNDED`, or of `WAYS` but "peer"; all but "plain" clip per-example gradients and add noise.
    """
    import torch

    from offsite.adapter.methods import attach
    from offsite.adapter.spec import AdapterSpec
    from offsite.emulator.package.package_reader import load, read_manifest
    from offsite.emulator.runtime.stored_model import holding
    from offsite.emulator.runtime.weight_forms import STORED, WIDENED
    from offsite.emulator.structure.from_config import empty_model
    from offsite.emulator.structure.geometry import slot_paths
    from offsite.privacy.batches import trainable
    from offsite.privacy.engines import ENGINES
    from offsite.task.examples import Examples
    from offsite.task.tasks import TASKS

    task, manifest = TASKS["causal_lm"], read_manifest(package)
    text = (package / "config.json").read_text(encoding="utf-8")
    slots, _ = slot_paths(empty_model(text, manifest.auto, torch.float32, allocated=False), manifest.geometry)
    spec = AdapterSpec("lora", rank=8, alpha=16.0, targets=TARGETS, slots=slots)
    weights = way if way in ROUNDED else STORED if way == "held" else WIDENED
    model = attach(load(package, dtype=torch.float32, hold=holding(weights, spec)), spec)
    ids = _ids(model.config.vocab_size, batch, length)
    examples = Examples(ids, torch.ones_like(ids))
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def plain() -> None:
        optimizer.zero_grad(set_to_none=True)
        task.losses(model, examples).mean().backward()
        optimizer.step()

    if way == "plain":
        return _timed(plain, steps)
    with ENGINES["bookkeeping"](model) as engine:

        def clipped() -> None:
            engine.add(task.losses, examples, lambda norms, _: (1.0 / norms).clamp(max=1.0))
            for parameter in parameters:
                summed = parameter.__dict__.pop("summed_grad")
                parameter.grad = ((summed + torch.randn(summed.shape)) / len(ids)).float()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return _timed(clipped, steps)


def _ids(vocabulary: int, batch: int, length: int) -> Any:
    import torch

    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def _timed(step: Any, steps: int) -> dict[str, Any]:
    seconds = []
    for _ in range(steps + 1):
        began = time.process_time()
        step()
        seconds.append(time.process_time() - began)
    peak = next(
        int(line.split()[1]) / 1024
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        if line.startswith("VmHWM")
    )
    return {"cpu_seconds": round(statistics.median(seconds[1:]), 3), "peak_mb": round(peak)}


def billion(folder: Path, recipe: tuple[str, ...]) -> tuple[Path, Path]:
    """Writes a model of 1.1 billion random weights and, from its shards, the emulator; returns both folders."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from offsite.emulator.build.package_writer import EmulatorDesign, write_package
    from offsite.emulator.calibration.middle import Calibration
    from offsite.emulator.calibration.source import ShardSource
    from offsite.emulator.structure.geometry import Geometry

    model, package = folder / "model", folder / "package"
    torch.manual_seed(0)
    config = LlamaConfig(**BILLION)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model, max_shard_size="500MB")
    source = ShardSource(model, torch.bfloat16)
    ids = _ids(32000, 4, 64)
    write_package(
        source,
        EmulatorDesign(Geometry.of(source.model, 1, 1), recipe, "int4"),
        Calibration(lambda m: m(input_ids=ids)),
        package,
    )
    return model, package


def fresh(arguments: argparse.Namespace, way: str, package: Path) -> dict[str, Any]:
    """Runs one case in a process of its own and returns its result."""
    command = [sys.executable, "-m", "bench.emulator_cost", "--model", str(arguments.model), "--packages", str(package)]
    sizes = ["--batch", str(arguments.batch), "--length", str(arguments.length), "--steps", str(arguments.steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *sizes, "--way", way], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    costs: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return costs


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the peer and all ways of each package in turn; ratios are relative to the peer of the same run."""
    from offsite.emulator.package.package_reader import read_manifest

    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.repeats):
        for package in arguments.packages:
            for way in dict.fromkeys(("peer", *arguments.ways)):
                name = "peer" if way == "peer" else f"{package.name}|{way}"
                runs.setdefault(name, []).append(fresh(arguments, way, package))
    seconds = {name: statistics.median(run["cpu_seconds"] for run in of) for name, of in runs.items()}
    peaks = {name: max(run["peak_mb"] for run in of) for name, of in runs.items()}
    sizes = {}
    for package in arguments.packages:
        manifest = read_manifest(package)
        sizes[package.name] = {
            "shipped": manifest.shipped_bytes / manifest.full_bytes,
            "compute": manifest.compute_ratio,
        }
    return {
        "tokens": [arguments.batch, arguments.length],
        "load_before": round(os.getloadavg()[0], 2),
        "cpu_seconds": seconds,
        "peak_mb": peaks,
        "faster": {name: round(seconds["peer"] / value, 2) for name, value in seconds.items() if name != "peer"},
        "smaller": {name: round(peaks["peer"] / value, 2) for name, value in peaks.items() if name != "peer"},
        "packages": sizes,
        "runs": runs,
    }


def main() -> None:
    """Measures and prints JSON, or runs the steps of one case."""
    parser = argparse.ArgumentParser(description="a site's training step over LoRA on the full model")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--packages", type=Path, nargs="*", default=[])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--billion", nargs="*", help="recipe for the emulator of a random model with 1.1 billion weights"
    )
    parser.add_argument(
        "--ways", nargs="*", choices=(*WAYS, *ROUNDED), default=WAYS, help="ways to measure; the peer always runs"
    )
    parser.add_argument("--way", choices=(*WAYS, *ROUNDED), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = (arguments.batch, arguments.length, arguments.steps)
    if arguments.way == "peer":
        print(json.dumps(peer(arguments.model, *sizes)))
    elif arguments.way is not None:
        print(json.dumps(site(arguments.packages[0], *sizes, arguments.way)))
    elif arguments.billion is not None:
        with tempfile.TemporaryDirectory() as folder:
            arguments.model, package = billion(Path(folder), tuple(arguments.billion))
            arguments.packages = [package]
            print(json.dumps(measure(arguments), indent=1))
    else:
        print(json.dumps(measure(arguments), indent=1))


if __name__ == "__main__":
    main()
