"""A whole job on a device, both sides in one process, with time and peak memory by step; then a site alone.

The sections `small`, `job` and `site` of `bench/gpu.py`. The model has random weights, written to disk shard by shard;
everything else is what `offsite simulate` runs: check of the folder, build, gate, clip, rounds, plug-in, scores.
"""

import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from offsite.cli.display import PlainDisplay
from offsite.client.training.estimate import estimate
from offsite.coordinator.config.compute_table import ComputeConfig
from offsite.coordinator.config.federation_file import read_config
from offsite.simulation.memory_engine import memory_engine
from offsite.simulation.run_folder import Run, simulated_sessions
from offsite.simulation.simulate import Options, simulate
from offsite.task.device import choose_device
from offsite.task.device_memory import held_at_most, reset_peak

LLAMA_8B = {  # Llama-3.1-8B
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
WORDS = [f"w{number}" for number in range(60)]
OWNERS = ("ash", "birch", "cedar")
SHARD_BYTES = 2 << 30
FED = """
seed = 1

[model]
path = "model"

[data]
public = "data/public"
sites_dir = "data/sites"
owners = ["ash", "birch", "cedar"]
length = {length}
split = "blocks"

[emulator]
first = 2
last = 2
compress = ["skip_uniform:0.5", "int4:64"]
embedding = "int4:64"
gate = -1.0

[adapter]
rank = 8

[training]
rounds = 1
local_steps = 2
batch = {batch}

[evaluation]
examples = 8
public_examples = 8
"""


class SteppedDisplay(PlainDisplay):
    """Keeps the seconds and the device's peak of memory of each step that a run names."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.steps: list[dict[str, Any]] = []
        self._device, self._name, self._since = device, "start", time.monotonic()
        reset_peak(device)

    def step(self, text: str) -> None:
        """Ends the current step and begins another."""
        self.end()
        self._name = text
        super().step(text)

    def end(self) -> None:
        """Ends the current step."""
        peak, now = held_at_most(self._device), time.monotonic()
        self.steps.append({"step": self._name, "seconds": round(now - self._since, 2), "peak_mb": peak >> 20})
        self._since = now
        reset_peak(self._device)


def write_world(folder: Path, shape: dict[str, Any], device: torch.device, *, length: int, batch: int) -> Path:
    """Writes a model of random weights, texts and a federation file, and returns the path of the latter."""
    write_model(folder / "model", shape, device)
    records = max(160, 24 * batch)
    for part in [f"sites/{owner}/{name}" for owner in OWNERS for name in ("train", "heldout")] + ["public"]:
        place = folder / "data" / part
        place.mkdir(parents=True)
        draw = random.Random(part)
        count = records * length if part.endswith(("train", "public")) else 24 * length
        (place / "text.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(count)))
    path = folder / "fed.toml"
    path.write_text(FED.format(length=length, batch=batch))
    return path


def write_model(folder: Path, shape: dict[str, Any], device: torch.device) -> None:
    """Writes a Llama of random 16-bit weights in shards, made on the device; it is never in memory as a whole."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        named = list(LlamaForCausalLM(config).named_parameters())
    folder.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(0)
    shards, held, where, total = [dict[str, torch.Tensor]()], 0, dict[str, int](), 0
    for name, parameter in named:
        tensor = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
        if parameter.ndim > 1:
            tensor.normal_(0, 0.02, generator=generator)
        size = tensor.numel() * 2
        if held and held + size > SHARD_BYTES:
            save_file(shards[-1], folder / _shard(len(shards)), {"format": "pt"})
            shards[-1] = {}
            shards.append({})
            held = 0
        shards[-1][name], where[name] = tensor.cpu(), len(shards)
        held, total = held + size, total + size
    save_file(shards[-1], folder / _shard(len(shards)), {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": {name: _shard(number) for name, number in where.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {word: number + 3 for number, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)


def _shard(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def run_job(path: Path, out: Path, device: torch.device) -> dict[str, Any]:
    """Runs a federation on a device, and returns seconds and peak memory by step, and the largest peak."""
    config, sha256 = read_config(path)
    run = Run.create(dataclasses.replace(config, compute=ComputeConfig(str(device))), sha256, out)
    display = SteppedDisplay(choose_device(str(device)))
    with display:
        simulate(run, Options(memory_engine, "memory", display, "2026-01-01T00:00:00+00:00"))
    display.end()
    report = json.loads((out / "report.json").read_text())
    return {
        "steps": display.steps,
        "peak_mb": max(step["peak_mb"] for step in display.steps),
        "cost": report["cost"],
        "rounds": report.get("rounds", [])[:1],
    }


def site_alone(out: Path, device: torch.device) -> dict[str, Any]:
    """Opens the job of a run folder as one site does, alone on the device: vetting, probe, and whole steps."""
    run = Run.open(out)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, compute=ComputeConfig(str(device))))
    manifest = run.store.job()
    if manifest is None:
        raise RuntimeError(f"run={str(out)!r}: no job was prepared there; run the section job first")
    reset_peak(device)
    began = time.monotonic()
    session = simulated_sessions(run, manifest)[OWNERS[0]]
    opened, opening = time.monotonic() - began, held_at_most(device)
    cost = estimate(session, manifest, OWNERS[0])
    tokens = manifest.length * manifest.privacy.batch * manifest.local_steps / max(cost.round_seconds, 1e-9)
    return {
        "opening_seconds": round(opened, 2),
        "opening_peak_mb": opening >> 20,
        "step_peak_mb": cost.peak_bytes >> 20,
        "round_seconds": cost.round_seconds,
        "tokens_per_second": round(tokens),
        "engine": cost.engine,
    }


def same_adapters(path: Path, folder: Path, device: torch.device) -> dict[str, Any]:
    """Runs a small job on the CPU and twice on the device: equal to rounding, and twice the same bits."""
    adapters = []
    for name, where in (("cpu", torch.device("cpu")), ("first", device), ("second", device)):
        run_job(path, folder / name, where)
        adapters.append(load_file(folder / name / "adapter" / "adapter_model.safetensors"))
    expected, first, second = adapters
    off = max(
        float((first[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-12))
        for name, tensor in expected.items()
    )
    same = all(torch.equal(first[name], second[name]) for name in first)
    return {"largest_relative_difference": off, "tolerance": 1e-3, "equal": off <= 1e-3, "deterministic": same}
