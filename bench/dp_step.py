"""Time and memory of a private training step over a plain one: offsite's three engines and three ways of Opacus.

`python -m bench.dp_step` runs all ways in turn in one process with one thread for the times (process time), and then
each way in a process of its own for its peak of memory. Each step is whole: forward, backward, clip, noise, update,
per-example mean losses. `--model FOLDER` takes a causal language model; the default is a random Llama of 23 million
parameters.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

BATCH, LENGTH, CLIP, NOISE = 8, 128, 1.0, 1.0
ADAPTERS = ("lora", "blocks")
OURS = ("bookkeeping", "slot", "loop")
REPEATS = 3  # processes for a peak of memory, which varies by some percent
PEERS = ("hooks", "functorch", "ghost")  # stock Opacus with its own optimizer and noise
WAYS = ("plain", *OURS, *PEERS)
BARS = {"lora": (1.10, 1.06), "blocks": (1.20, None)}  # largest time and largest peak of memory over the plain step's
Step = Callable[[], None]


SIZES = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "vocab_size": 32000,
}


def subject(folder: str, adapter: str, *, attached: bool, shape: dict[str, Any] | None = None) -> tuple[Any, Any, Any]:
    """Returns a model, its task and its examples; the model trains LoRA on its end blocks, or these blocks whole.

    Args:
      folder: folder of a causal language model; "" makes a random model.
      adapter: "lora", or "blocks" for whole blocks.
      attached: True trains whole blocks by method `blocks`, as offsite's engines need it; False trains the blocks' own
        weights, as in plain fine-tuning and as Opacus knows their layers.
      shape: configuration of the random Llama; None takes 23 million parameters.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from offsite.adapter.methods import attach
    from offsite.adapter.spec import AdapterSpec
    from offsite.privacy import optimizer  # noqa: F401 - loads Opacus, so that each way has the same libraries in memory
    from offsite.privacy.engines import ENGINES
    from offsite.task.causal_lm import CausalLM
    from offsite.task.examples import Examples

    if unknown := set(OURS) - ENGINES.keys():
        raise RuntimeError(f"engines={unknown}: not in ENGINES any more; change WAYS")
    task = CausalLM()
    torch.manual_seed(0)
    if folder:
        model: Any = task.load(folder, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(LlamaConfig(**(shape or SIZES), use_cache=False)).eval()
    model.requires_grad_(False)
    count = len(model.model.layers)
    slots = tuple(f"model.layers.{index}" for index in (0, 1, count - 2, count - 1))
    if adapter == "lora":
        dense = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        model = attach(model, AdapterSpec("lora", rank=8, alpha=16.0, targets=dense, slots=slots))
    elif attached:
        model = attach(model, AdapterSpec("blocks", slots=slots))
    else:
        for slot in slots:
            model.get_submodule(slot).requires_grad_(True)
    ids = torch.randint(model.config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return model, task, Examples(ids, torch.ones_like(ids))


def plain(model: Any, task: Any, examples: Any, stack: ExitStack) -> Step:
    """Returns the function of a plain step, without clip and noise."""
    import torch

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        task.losses(model, examples).mean().backward()
        optimizer.step()

    return step


def ours(engine: str) -> Callable[..., Step]:
    """Returns the maker of a step by an engine of offsite, with its optimizer and the operating system's noise."""

    def make(model: Any, task: Any, examples: Any, stack: ExitStack) -> Step:
        import torch

        from offsite.privacy.batches import trainable
        from offsite.privacy.clipped_sum import clipping
        from offsite.privacy.engines import ENGINES
        from offsite.privacy.optimizer import NoisyMeanOptimizer
        from offsite.privacy.randomness import Randomness

        optimizer = NoisyMeanOptimizer(
            torch.optim.SGD(list(trainable(model).values()), lr=1e-4),
            randomness=Randomness.from_os(),
            private=True,
            noise_multiplier=NOISE,
            max_grad_norm=CLIP,
            expected_batch_size=BATCH,
        )
        opened, weigh = stack.enter_context(ENGINES[engine](model)), clipping(CLIP, private=True)

        def step() -> None:
            opened.add(task.losses, examples, weigh)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return make


def opacus(way: str) -> Callable[..., Step]:
    """Returns the maker of a step by stock Opacus."""

    def make(model: Any, task: Any, examples: Any, stack: ExitStack) -> Step:
        import torch
        from opacus.grad_sample import GradSampleHooks
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        facts = {"noise_multiplier": NOISE, "max_grad_norm": CLIP, "expected_batch_size": BATCH}
        modes = [(module, module.training) for module in model.modules()]
        stack.callback(lambda: [setattr(module, "training", mode) for module, mode in modes])
        model.train()
        if way == "ghost":
            ghost = GradSampleHooksFastGradientClipping(model, max_grad_norm=CLIP)
            stack.callback(ghost.cleanup)
            private: Any = DPOptimizerFastGradientClipping(inner, **facts)

            def step() -> None:
                DPTensorFastGradientClipping(ghost, private, task.losses(model, examples)).backward()
                private.step()
                private.zero_grad(set_to_none=True)

            return step
        if way == "ew":
            return expanded_weights(model, task, examples, DPOptimizer(inner, **facts))
        hooks = GradSampleHooks(model, force_functorch=way == "functorch")
        stack.callback(hooks.cleanup)
        private = DPOptimizer(inner, **facts)

        def step() -> None:
            task.losses(model, examples).mean().backward()
            private.step()
            private.zero_grad(set_to_none=True)

        return step

    return make


def expanded_weights(model: Any, task: Any, examples: Any, private: Any) -> Step:
    """Returns a step by the expanded weights of PyTorch, which know few kinds of layers."""
    from opacus.grad_sample import GradSampleModuleExpandedWeights
    from torch.nn.functional import cross_entropy

    wrapped, ids = GradSampleModuleExpandedWeights(model), examples.input_ids

    def step() -> None:
        logits = wrapped(ids).logits[:, :-1]  # only a positional batch is split by record
        cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        private.step()
        private.zero_grad(set_to_none=True)

    return step


def maker(way: str) -> Callable[..., Step]:
    """Returns the maker of a way's step."""
    if way == "plain":
        return plain
    return opacus(way) if way in (*PEERS, "ew") else ours(way)


def times(folder: str, adapter: str, rounds: int) -> dict[str, list[float]]:
    """Returns process seconds of each way's steps; every round runs the ways in turn, after one round to warm up."""
    import torch

    torch.set_num_threads(1)
    subjects = {attached: subject(folder, adapter, attached=attached) for attached in (True, False)}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds + 1):
        for way in WAYS:
            model, task, examples = subjects[way in OURS]
            with ExitStack() as stack:
                step = maker(way)(model, task, examples, stack)
                began = time.process_time()
                step()
                seconds[way].append(time.process_time() - began)
            model.zero_grad(set_to_none=True)
    return {way: of[1:] for way, of in seconds.items()}


def peak(folder: str, adapter: str, way: str) -> dict[str, float]:
    """Returns the peak of memory of three steps of one way, and the memory before the steps, both in MB."""
    import torch

    torch.set_num_threads(1)
    model, task, examples = subject(folder, adapter, attached=way in OURS)
    before = _status("VmRSS")
    with ExitStack() as stack:
        step = maker(way)(model, task, examples, stack)
        for _ in range(3):
            step()
    return {"before_mb": round(before), "peak_mb": round(_status("VmHWM"))}


def peaks_of(folder: str, adapter: str, repeats: int) -> dict[str, dict[str, float]]:
    """Returns the median peak of each way over some processes, the ways in turn."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            runs[way].append(fresh("--adapter", adapter, "--model", folder, "--way", way))
    return {
        way: {key: statistics.median(run[key] for run in of) for key in ("before_mb", "peak_mb")}
        for way, of in runs.items()
    }


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def fresh(*arguments: str) -> Any:
    """Runs this program with other arguments in a process of its own, and returns the printed JSON."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.dp_step", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: str, rounds: int) -> dict[str, Any]:
    """Returns each adapter's times and peaks over those of the plain step, and whether the bars are met."""
    result: dict[str, Any] = {"tokens": [BATCH, LENGTH], "load_before": round(os.getloadavg()[0], 2)}
    for adapter in ADAPTERS:
        seconds = fresh("--adapter", adapter, "--model", folder, "--rounds", str(rounds))
        ratios = {
            way: round(statistics.median(mine / base for mine, base in zip(of, seconds["plain"], strict=True)), 3)
            for way, of in seconds.items()
        }
        peaks = peaks_of(folder, adapter, REPEATS)
        rise = {way: of["peak_mb"] / peaks["plain"]["peak_mb"] for way, of in peaks.items()}
        max_time, max_memory = BARS[adapter]
        result[adapter] = {
            "plain_seconds": round(statistics.median(seconds["plain"]), 3),
            "time": ratios,
            "peak_mb": {way: of["peak_mb"] for way, of in peaks.items()},
            "peak": {way: round(value, 3) for way, value in rise.items()},
            "bars_met": {
                "time": ratios["bookkeeping"] <= max_time,
                "memory": max_memory is None or rise["bookkeeping"] <= max_memory,
                "never_slower_than_opacus": ratios["bookkeeping"] <= min(ratios[peer] for peer in PEERS),
            },
        }
    return result


def main(argv: list[str] | None = None) -> int:
    """Measures and prints JSON, or runs the steps of one case."""
    parser = argparse.ArgumentParser(description="a private training step against a plain one")
    parser.add_argument("--model", default="", help="folder of a causal language model")
    parser.add_argument(
        "--rounds", type=int, default=36, help="rounds of timed steps; 7 are enough for whole blocks, but not for LoRA"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--adapter", choices=ADAPTERS, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.way is not None:
        print(json.dumps(peak(args.model, args.adapter, args.way)))
        return 0
    if args.adapter is not None:
        print(json.dumps(times(args.model, args.adapter, args.rounds)))
        return 0
    result = measure(args.model, args.rounds)
    print(text := json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0 if all(all(result[adapter]["bars_met"].values()) for adapter in ADAPTERS) else 1


if __name__ == "__main__":
    raise SystemExit(main())
