"""Peak memory and time of a client's training step, with all logits at once and by chunks.

`python -m bench.chunked_head` runs each case in fresh processes with one thread, the ways in turn, and prints JSON. A
step takes per-example gradients by book-keeping, as a client does, on random tokens. `--chunks` compares chunk sizes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODEL = Path.home() / ".cache/offsite/models/smollm2-135m-instruct"
BATCH, LENGTH = 4, 256
BLOCKS = {"all": None, "ends": (0, 1, 28, 29)}  # blocks of the tower that carry LoRA; None is every block
CHUNKS = (64, 128, 256, 512, 1024)
WHOLE = "whole"
MIN_SAVED_MB, MAX_TIME = 300.0, 1.05


def step(folder: Path, blocks: tuple[int, ...] | None, chunk: int | None, steps: int) -> dict[str, Any]:
    """Returns time, memory and results of `steps` steps with per-example gradients, after one step to warm up.

    Args:
      folder: folder of the model.
      blocks: numbers of the blocks that carry LoRA; None is every block.
      chunk: tokens of a chunk; None takes all logits at once.
      steps: number of timed steps.
    """
    import torch

    from offsite.adapter.methods import attach
    from offsite.adapter.spec import AdapterSpec
    from offsite.privacy.engines import ENGINES
    from offsite.task.causal_lm import CausalLM
    from offsite.task.examples import Examples

    torch.set_num_threads(1)
    task = CausalLM(chunk)
    model = task.load(folder, dtype=torch.float32)
    count = len(model.model.layers)
    slots = tuple(f"model.layers.{index}" for index in blocks or range(count))
    model = attach(model, AdapterSpec(method="lora", slots=slots))
    ids = torch.randint(model.config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    examples = Examples(ids, torch.ones_like(ids))
    if chunk is not None and (obstacle := task.obstacle(model)):
        raise RuntimeError(f"obstacle={obstacle!r}: this model's logits cannot be taken by chunks")
    before, seconds = _status("VmRSS"), []
    with ENGINES["bookkeeping"](model) as engine:
        for _ in range(steps + 1):
            began = time.process_time()
            rows = engine.add(task.losses, examples, lambda norms, _: (1.0 / norms).clamp(max=1.0))
            seconds.append(time.process_time() - began)
        norm = sum(norm**2 for norm in rows.norms) ** 0.5
    return {
        "cpu_seconds": round(statistics.median(seconds[1:]), 3),
        "peak_mb": round(_status("VmHWM")),
        "before_mb": round(before),
        "loss": statistics.fmean(rows.losses),
        "gradient_norm": norm,
    }


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def fresh(folder: Path, blocks: str, way: str, steps: int) -> dict[str, Any]:
    """Runs `step` in a process of its own and returns its result."""
    command = [sys.executable, "-m", "bench.chunked_head", "--model", str(folder), "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--blocks", blocks, "--way", way], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    costs: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return costs


def measure(folder: Path, ways: tuple[str, ...], repeats: int, steps: int) -> dict[str, Any]:
    """Runs all ways in turn, `repeats` times; compares median time and highest peak with those of the first way."""
    load, result = os.getloadavg()[0], {}
    for blocks in BLOCKS:
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way in ways:
                runs[way].append(fresh(folder, blocks, way, steps))
        seconds = {way: statistics.median(run["cpu_seconds"] for run in of) for way, of in runs.items()}
        peaks = {way: max(run["peak_mb"] for run in of) for way, of in runs.items()}
        first = ways[0]
        result[blocks] = {
            "cpu_seconds": seconds,
            "peak_mb": peaks,
            "time_ratio": {way: round(seconds[way] / seconds[first], 3) for way in ways[1:]},
            "peak_ratio": {way: round(peaks[way] / peaks[first], 3) for way in ways[1:]},
            "loss_apart": max(_apart(runs, way, "loss") for way in ways[1:]),
            "gradient_norm_apart": max(_apart(runs, way, "gradient_norm") for way in ways[1:]),
            "runs": runs,
        }
    return {"tokens": [BATCH, LENGTH], "load_before": round(load, 2), "cpus": os.cpu_count(), "blocks": result}


def _apart(runs: dict[str, list[dict[str, Any]]], way: str, what: str) -> float:
    """Returns the relative difference of a way's result from the result with all logits at once."""
    right: float = runs[WHOLE][0][what]
    return abs(float(runs[way][0][what]) - right) / abs(right)


def main(argv: list[str] | None = None) -> int:
    """Measures and prints JSON, or runs the steps of one case."""
    from offsite.task.chunked_head import CHUNK

    parser = argparse.ArgumentParser(description="a training step with all logits at once and by chunks")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--chunks", action="store_true", help="compare sizes of chunks")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--blocks", choices=list(BLOCKS), help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.way is not None:
        chunk = None if args.way == WHOLE else int(args.way)
        print(json.dumps(step(args.model, BLOCKS[args.blocks], chunk, args.steps)))
        return 0
    ways = (WHOLE, *(str(size) for size in (CHUNKS if args.chunks else (CHUNK,))))
    result = measure(args.model, ways, args.repeats, args.steps)
    cases, own = result["blocks"].values(), str(CHUNK)
    result["bars_met"] = {
        "memory": all(case["peak_mb"][WHOLE] - case["peak_mb"][own] >= MIN_SAVED_MB for case in cases),
        "time": all(case["time_ratio"][own] <= MAX_TIME for case in cases),
    }
    print(text := json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0 if all(result["bars_met"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
