"""Time of a site's private training steps in several processes over one process, on the CPU.

`python -m bench.site_processes` makes an emulator in the shape of SmolLM2-135M with random weights, starts the workers,
and trains the same steps in turn: in one process with one thread, in one process with all threads, and in several
processes that share the threads. It prints JSON: wall-clock seconds of a step, ratios, processor seconds of each
process, which other programs disturb less, seconds of the start, which is not part of a step, and how far the updates
are apart in steps of the ring.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "use_cache": False,
}
SITES = ("east", "north", "west")
CLIP, RATE = 1.0, 0.5
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_emulator(folder: Path) -> Path:
    """Writes a random model with a tokenizer, and its emulator: blocks 2 to 27 in 8 bits; returns the package."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from offsite.emulator.build.package_writer import EmulatorDesign, write_package
    from offsite.emulator.calibration.middle import Calibration
    from offsite.emulator.calibration.source import ShardSource
    from offsite.emulator.structure.geometry import Geometry

    model, package = folder / "model", folder / "package"
    torch.manual_seed(0)
    config = LlamaConfig(**SMOLLM2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    words = models.WordLevel(vocab={f"w{index}": index for index in range(1000)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0", pad_token="w1").save_pretrained(model)
    source, ids = ShardSource(model, torch.bfloat16), torch.randint(1000, (2, 16))
    design = EmulatorDesign(Geometry.of(source.model, 2, 2), ("int8:32",), "int8:32")
    write_package(source, design, Calibration(lambda m: m(input_ids=ids)), package, tokenizer=model)
    return package


def job_on(package: Path, arguments: argparse.Namespace) -> Any:
    """Returns a job with LoRA on the four end blocks of the emulator."""
    import torch

    from offsite.adapter.layout import Layout
    from offsite.adapter.methods import attach
    from offsite.adapter.spec import AdapterSpec
    from offsite.emulator.package.package_folder import tokenizer_sha256
    from offsite.emulator.package.package_reader import load, read_manifest
    from offsite.emulator.structure.geometry import slot_paths
    from offsite.protos.job_manifest import JobManifest, PrivacyTerms

    facts, model = read_manifest(package), load(package, dtype=torch.float32)
    spec = AdapterSpec("lora", rank=8, alpha=16.0, targets=TARGETS, slots=slot_paths(model, facts.geometry)[0])
    return JobManifest(
        federation="bench",
        epoch=1,
        roster=tuple((site, f"{number:064x}") for number, site in enumerate(SITES)),
        n_min=len(SITES),
        accomplices=1,
        task="causal_lm",
        emulator=facts.digest(),
        base="00" * 32,
        tokenizer=tokenizer_sha256(facts.files),
        adapter=spec,
        layout=Layout.of(attach(model, spec)),
        length=arguments.length,
        split="truncate",
        rounds=1,
        local_steps=arguments.steps,
        learning_rate=RATE,
        update_bound=8 * CLIP * RATE * arguments.steps,
        privacy=PrivacyTerms(True, 8.0, CLIP, "rdp", arguments.batch),
        physical_batch=arguments.batch,
        model="bench",
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets the threads of this process."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_seconds() -> list[float]:
    """Returns the processor seconds of this process and of each worker, so far."""
    import psutil

    this = psutil.Process()
    return [sum(process.cpu_times()[:2]) for process in (this, *this.children())]


def opened(arguments: argparse.Namespace, folder: Path) -> tuple[Any, Any, float]:
    """Returns a site's job on a new emulator, its workers, and the seconds that their start took."""
    import torch

    from offsite.client.training.emulator_session import open_session
    from offsite.client.training.local_update import SiteJob
    from offsite.client.training.privacy_plan import SitePlan
    from offsite.client.training.workers import Workers
    from offsite.emulator.vetting.limits import VettingThresholds
    from offsite.task.examples import Examples

    package = write_emulator(folder)
    manifest = job_on(package, arguments)
    devices = (torch.device("cpu"),) * arguments.processes
    options: dict[str, Any] = {"emulator": manifest.emulator, "limits": VettingThresholds()}
    session = open_session(package, manifest, seed=1, vetted=True, **options)  # random weights are not honest ones
    began = time.perf_counter()
    workers = Workers.beside(package, manifest, weights="widened", devices=devices, **options)
    started = time.perf_counter() - began
    ids = torch.randint(1000, (arguments.batch, arguments.length), generator=torch.Generator().manual_seed(0))
    plan = SitePlan(arguments.batch, 1.0, 1e-6, 1.0, 8.0, arguments.steps)  # every record in every step
    return SiteJob(SITES[0], manifest, session, Examples(ids, torch.ones_like(ids)), plan), workers, started


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains in all ways in turn."""
    import numpy as np
    import torch

    from offsite.client.training.local_update import local_update
    from offsite.privacy.randomness import Randomness
    from offsite.secagg import ring

    job, workers, started = opened(arguments, folder)
    start, cores, name = job.session.start.copy(), torch.get_num_threads(), f"{arguments.processes} processes"
    ways = {"1 process, 1 thread": (1, None), f"1 process, {cores} threads": (cores, None), name: (cores, workers)}
    updates, seconds = dict[str, Any](), dict[str, list[float]]()
    busy = dict[str, list[list[float]]]()
    for repeat in range(arguments.repeats + 1):  # the first is not counted: it probes, and memory is fetched
        for way, (count, beside) in ways.items():
            job.session.workers = beside
            with threads(count):
                began, before = time.perf_counter(), cpu_seconds()
                trained = local_update(job, start, randomness=Randomness.for_simulation(1, "bench"))
                took = (time.perf_counter() - began) / arguments.steps
                spent = [(b - a) / arguments.steps for a, b in zip(before, cpu_seconds(), strict=True)]
            updates[way] = trained.update.astype(np.float64)
            if repeat:
                seconds.setdefault(way, []).append(took)
                busy.setdefault(way, []).append(spent)
    workers.close()
    step = {way: statistics.median(of) for way, of in seconds.items()}
    scale = ring.scale(job.manifest.update_bound, len(SITES))
    return {
        "records": [arguments.batch, arguments.length],
        "load": [round(value, 2) for value in os.getloadavg()],
        "seconds_a_step": {way: round(value, 3) for way, value in step.items()},
        "ratio": {f"{name} over {way}": round(step[name] / value, 3) for way, value in step.items() if way != name},
        "cpu_seconds_a_step": {
            way: [round(statistics.median(each), 3) for each in zip(*of, strict=True)] for way, of in busy.items()
        },
        "start_seconds": round(started, 1),
        "ring_steps_apart": {
            way: round(float(np.abs(update - updates[name]).max()) * scale, 3) for way, update in updates.items()
        },
        "runs": {way: [round(value, 3) for value in of] for way, of in seconds.items()},
    }


def main() -> None:
    """Measures and prints JSON."""
    parser = argparse.ArgumentParser(description="a site's training steps in several processes over one")
    parser.add_argument("--processes", type=int, default=2, choices=range(2, 65), metavar="N", help="2 to 64")
    parser.add_argument("--batch", type=int, default=8, help="records of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a record")
    parser.add_argument("--steps", type=int, default=3, help="steps of one training")
    parser.add_argument("--repeats", type=int, default=3, help="trainings of each way that count")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(arguments, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
