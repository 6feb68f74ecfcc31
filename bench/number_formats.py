"""Time of bfloat16 over float32 on this machine: forward passes and private steps of one emulator, in turn.

`python -m bench.number_formats` prints the ratio of process times in one process with one thread, and the cosine of
the clipped sums of both formats. `--package FOLDER` takes an emulator's package of a causal language model; the default
is a random Llama of 69 million parameters.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

BATCH, LENGTH, CLIP = 8, 128, 1.0
FORMATS = ("float32", "bfloat16")


def subject(package: str, dtype: Any) -> Any:
    """Returns a model in a number format, with FFA-LoRA on the value projections of its first and last block."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from offsite.adapter.methods import attach
    from offsite.adapter.spec import AdapterSpec
    from offsite.emulator.package import package_reader
    from offsite.task.number_format import in_dtype

    torch.manual_seed(0)
    if package:
        model: Any = package_reader.load(package, dtype=torch.float32)
    else:
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 9}
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32000, use_cache=False)).eval()
    model = in_dtype(model.requires_grad_(False), dtype)
    ends = (0, len(model.model.layers) - 1)
    slots = tuple(f"model.layers.{place}" for place in ends)
    adapted = attach(model, AdapterSpec("ffa_lora", rank=4, alpha=8.0, targets=("v_proj",), slots=slots))
    return adapted


def seconds(work: Callable[[], object]) -> float:
    """Returns the process time of one call."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def clipped_sum(model: Any, task: Any, batch: Any) -> Any:
    """Returns the sum of clipped gradients as one float64 vector."""
    import torch

    from offsite.privacy.batches import trainable
    from offsite.privacy.engines import ENGINES

    with ENGINES["bookkeeping"](model) as engine:
        engine.add(task.losses, batch, lambda norms, _: (CLIP / norms).clamp(max=1.0))
        return torch.cat([parameter.summed_grad.flatten() for parameter in trainable(model).values()])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", default="")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from offsite.task.causal_lm import CausalLM
    from offsite.task.examples import Examples
    from offsite.task.number_format import has_fast_bfloat16

    torch.set_num_threads(1)
    task = CausalLM()
    models = {name: subject(arguments.package, getattr(torch, name)) for name in FORMATS}
    words = models["float32"].config.vocab_size
    ids = torch.randint(5, words, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    batch = Examples(ids, torch.ones_like(ids))
    sums = {name: clipped_sum(model, task, batch) for name, model in models.items()}  # also warms up
    steps: dict[str, list[float]] = {name: [] for name in FORMATS}
    passes: dict[str, list[float]] = {name: [] for name in FORMATS}
    for _ in range(arguments.repeats):
        for name, model in models.items():
            steps[name].append(seconds(lambda model=model: clipped_sum(model, task, batch)))
            passes[name].append(seconds(lambda model=model: task.run(model, batch)))
    print(f"fast bfloat16 by the CPU's flags: {has_fast_bfloat16(torch.device('cpu'))}")
    for what, times in (("private step", steps), ("forward pass", passes)):
        wide, narrow = (statistics.median(times[name]) for name in FORMATS)
        print(f"{what}: float32 {wide:.2f} s, bfloat16 {narrow:.2f} s, ratio {narrow / wide:.2f}")
    print(f"cosine of the clipped sums: {float(torch.cosine_similarity(*sums.values(), dim=0)):.5f}")


if __name__ == "__main__":
    main()
