"""The memory of a site beside its imports, and the time of a step, by form of frozen weights and by recomputation.

`python -m bench.site_memory --package PACKAGE` runs each case in its own process and prints JSON: peaks of resident
memory over what the imports take, of opening the package, of its vetting, and of private LoRA steps with book-keeping;
CPU seconds of a step; and how far each gradient is from the plain step's in the same form. `--billion RECIPE...` first
builds an emulator of a model of 1.1 billion random weights, block by block.
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

from bench.emulator_cost import billion

WAYS = ("widened", "stored", "stored recompute")
STEPS = 3
TARGETS = ("v_proj",)


def case(package: Path, way: str, batch: int, length: int) -> dict[str, Any]:
    """Returns peaks in MB over the imports, CPU seconds of a step, and the gradient's error, of one way.

    Args:
      package: folder of a package of a causal language model.
      way: a way of `WAYS`.
      batch: records in a step.
      length: tokens in a record.
    """
    import torch

    from offsite.adapter.methods import attach
    from offsite.adapter.spec import AdapterSpec
    from offsite.emulator.package.package_reader import load, read_manifest
    from offsite.emulator.runtime.recomputation import frozen_blocks, recompute_blocks
    from offsite.emulator.runtime.refresh import plain_of
    from offsite.emulator.runtime.stored_model import holding
    from offsite.emulator.structure.from_config import empty_model
    from offsite.emulator.structure.geometry import slot_paths
    from offsite.emulator.vetting.limits import VettingThresholds
    from offsite.emulator.vetting.vet import vet
    from offsite.privacy.engines import ENGINES
    from offsite.task.examples import Examples
    from offsite.task.tasks import TASKS

    manifest = read_manifest(package)
    text = (package / "config.json").read_text(encoding="utf-8")
    slots, blocks = slot_paths(empty_model(text, manifest.auto, torch.float32, allocated=False), manifest.geometry)
    spec = AdapterSpec("lora", rank=8, alpha=16.0, targets=TARGETS, slots=slots)
    weights, _, again = way.partition(" ")
    found: dict[str, Any] = {"imports": _peak()}
    model: Any = load(package, dtype=torch.float32, hold=holding(weights, spec))
    found["opening"] = _peak() - found["imports"]
    model = attach(model, spec)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.01)
    if again:
        recompute_blocks(frozen_blocks(plain_of(model), blocks))
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    task, examples, seconds = TASKS["causal_lm"], Examples(ids, torch.ones_like(ids)), []
    with ENGINES["bookkeeping"](model) as engine:
        for _ in range(STEPS + 1):
            began = time.process_time()
            engine.add(task.losses, examples, lambda norms, _: torch.ones_like(norms))
            seconds.append(time.process_time() - began)
            private = [parameter.__dict__.pop("summed_grad") for parameter in parameters]
    found["step"] = _peak() - found["imports"]
    found["cpu_seconds"] = round(statistics.median(seconds[1:]), 2)
    plain = torch.autograd.grad(task.losses(model, examples).sum(), parameters)
    error = max(float((one - two).norm() / two.norm()) for one, two in zip(private, plain, strict=True))
    found["gradient_error"] = float(f"{error:.2g}")
    del model, plain, private
    fresh = load(package, dtype=torch.float32, hold=holding(weights, spec))
    vet(package, fresh, manifest, VettingThresholds(), seed=1)
    found["with_vetting"] = _peak() - found["imports"]
    return found


def _peak() -> int:
    """Returns the peak of resident memory of this process, MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


def fresh(package: Path, way: str, batch: int, length: int) -> dict[str, Any]:
    """Runs one case in a process of its own and returns its numbers."""
    command = [sys.executable, "-m", "bench.site_memory", "--package", str(package), "--way", way]
    sizes = ["--batch", str(batch), "--length", str(length)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *sizes], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measures all ways and prints JSON, or runs one case."""
    parser = argparse.ArgumentParser(description="memory of a site over its imports, MB")
    parser.add_argument("--package", type=Path, help="package of a causal language model")
    parser.add_argument("--billion", nargs="+", help="recipe of an emulator of a random model of 1.1 billion weights")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = (arguments.batch, arguments.length)
    if arguments.way is not None:
        print(json.dumps(case(arguments.package, arguments.way, *sizes)))
        return
    if (arguments.package is None) == (arguments.billion is None):
        parser.error("give either --package or --billion")
    with tempfile.TemporaryDirectory() as folder:
        package = arguments.package or billion(Path(folder), tuple(arguments.billion))[1]
        print(json.dumps({way: fresh(package, way, *sizes) for way in arguments.ways}, indent=1))


if __name__ == "__main__":
    main()
