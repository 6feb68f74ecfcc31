"""What `offsite plan` says about memory, against what is measured: one command, each phase in a process of its own.

`python -m bench.plan_memory` makes two Llamas of random weights (the shapes of SmolLM2-135M and TinyLlama-1.1B), runs
the coordinator's build and preparation, and the site's opening and private step, and prints the peak of each over the
imports beside the plan's number. The bar is 15 %. `--shape 135M` takes one model only; `--folder DIR` keeps models.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

BAR = 0.15
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "1.1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000,
    },
}  # fmt: skip
EXAMPLES = {"135M": (4, 128), "1.1B": (1, 256)}  # physical batch and length
PHASES = ("build", "package", "prepare", "open", "open stored", "step", "step stored")
UNCOMPARED, TOO_LARGE = ("package",), ("1.1B prepare",)  # a step of the bench; a preparation of over 10 GB
WORDS, RECORDS, SHARD = 1000, 320, 3e8
BUILD_LENGTH = 32  # tokens; a build looks at many examples


def make_model(folder: Path, shape: str) -> None:
    """Writes a model of random weights in bfloat16, with a tokenizer of invented words and public records."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from offsite.coordinator.plan.model_outline import leaves, read_outline

    folder.mkdir(parents=True)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "dtype": "bfloat16"}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPES[shape], **special}
    (folder / "config.json").write_text(json.dumps(config))
    generator, shards = torch.Generator().manual_seed(0), [dict[str, Any]()]
    for name, sizes in leaves(read_outline(folder).model):
        values = torch.ones(sizes) if len(sizes) == 1 else 0.02 * torch.randn(sizes, generator=generator)
        shards[-1][name] = values.bfloat16()
        if sum(tensor.nbytes for tensor in shards[-1].values()) > SHARD:
            shards.append({})
    places = dict[str, str]()
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    words = [f"w{i}" for i in range(WORDS)]
    made = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<s>", "</s>", "<unk>", *words])}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    draw = random.Random(0)
    rows = [json.dumps({"text": " ".join(draw.choices(words, k=300))}) for _ in range(RECORDS)]
    (folder / "public.jsonl").write_text("\n".join(rows) + "\n")


def run_phase(phase: str, shape: str, folder: Path) -> None:
    """Runs one phase in this process, and prints its peak over the imports in MB, as JSON."""
    from offsite.client.training import emulator_session  # noqa: F401
    from offsite.coordinator.job.prepare import Parties, prepare  # noqa: F401 - part of the imports of every phase
    from offsite.emulator.build import from_folder  # noqa: F401
    from offsite.privacy import optimizer  # noqa: F401

    before = _memory("VmRSS")
    if phase == "build":
        _build(shape, folder)
    elif phase == "package":
        _package(shape, folder)
    elif phase == "prepare":
        _prepare(shape, folder)
    else:
        session = _open(folder, "stored" if phase.endswith("stored") else "widened")
        if phase.startswith("step"):
            Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
            _step(session, shape)
    print(json.dumps((_memory("VmHWM") - before) / 1e6))


def _memory(name: str) -> int:
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name))
    return 1024 * int(line.split()[1])


def _build(shape: str, folder: Path) -> None:
    from offsite.emulator.build.from_folder import PublicData, build_from_folder
    from offsite.emulator.build.pipeline import Order

    order = Order(recipe=("int4:64",), gate=-1.0)
    data = PublicData(folder / "model" / "public.jsonl", sequences=16, length=BUILD_LENGTH)
    build_from_folder(folder / "model", folder / "built", order, data, device="cpu")


def _prepare(shape: str, folder: Path) -> None:
    from offsite.coordinator.config.federation_file import read_config
    from offsite.coordinator.job.prepare import Parties, prepare
    from offsite.coordinator.job.public_records import read_records
    from offsite.coordinator.job.store import Store

    batch, length = EXAMPLES[shape]
    public, names = folder / "model" / "public.jsonl", ("a", "b", "c")
    (folder / "fed.toml").write_text(
        f'model.path = "{folder}/model"\ndata.public = "{public}"\ndata.length = {length}\n'
        f"evaluation.public_examples = 2\ntraining.physical_batch = {batch}\n"
        'emulator.gate = -1.0\ncompute.device = "cpu"\n'
        + "".join(f'[[sites]]\nname = "{name}"\ntrain = "{public}"\nheldout = "{public}"\n' for name in names)
    )
    config = read_config(folder / "fed.toml")[0]
    parties = Parties("bench", 1, tuple((name, f"{place:064x}") for place, name in enumerate(names)), 3, 1)
    prepare(
        config, records=read_records(config, config.data.public), federation=parties,
        store=Store(folder / "run"), on_step=lambda text: None,
    )  # fmt: skip


def _package(shape: str, folder: Path) -> None:
    """Writes the package that the sites open, and the manifest of its job."""
    import torch

    from offsite.adapter.layout import Layout
    from offsite.adapter.methods import attach
    from offsite.adapter.spec import AdapterSpec
    from offsite.coordinator.plan.model_outline import read_outline
    from offsite.emulator.build.package_writer import EmulatorDesign, write_package
    from offsite.emulator.calibration.source import ShardSource
    from offsite.emulator.package.package_folder import tokenizer_sha256
    from offsite.emulator.structure.geometry import Geometry
    from offsite.protos.job_manifest import JobManifest, PrivacyTerms

    source, outline = ShardSource(folder / "model", torch.bfloat16), read_outline(folder / "model")
    geometry = Geometry.of(source.model)
    design = EmulatorDesign(geometry, ("int4:64",), "int8")
    facts = write_package(source, design, None, folder / "package", tokenizer=folder / "model")
    spec = AdapterSpec("ffa_lora", rank=4, alpha=8.0, slots=geometry.slots(outline.model))
    batch, length = EXAMPLES[shape]
    manifest = JobManifest(
        federation="bench", epoch=1, roster=tuple((f"s{place}", f"{place:064x}") for place in range(3)), n_min=3,
        accomplices=1, task="causal_lm", emulator=facts.digest(), base="0" * 64,
        tokenizer=tokenizer_sha256(facts.files), adapter=spec, layout=Layout.of(attach(outline.model, spec)),
        length=length, split="truncate", rounds=1, local_steps=1, learning_rate=1.0, update_bound=1.0,
        privacy=PrivacyTerms(True, 8.0, 1.0, "rdp", batch), physical_batch=batch, spare_rounds=0, model="bench",
        release="0", identifier="", deadline=3600.0,
    )  # fmt: skip
    (folder / "job.bin").write_bytes(manifest.to_bytes())


def _open(folder: Path, weights: str) -> Any:
    from offsite.client.training.emulator_session import open_session
    from offsite.emulator.vetting.limits import VettingThresholds
    from offsite.protos.job_manifest import JobManifest

    manifest = JobManifest.from_bytes((folder / "job.bin").read_bytes())
    return open_session(
        folder / "package", manifest, emulator=manifest.emulator, limits=VettingThresholds(), seed=1,
        weights=weights,
    )  # fmt: skip


def _step(session: Any, shape: str) -> None:
    from offsite.privacy.mechanism import DpSgdConfig, DpTraining, train
    from offsite.privacy.randomness import Randomness

    batch, length = EXAMPLES[shape]
    records = session.task.dummy_batch(session.model, length, seed=3).select([0] * batch)
    terms = DpSgdConfig(1.0, 1.0, 1.0, batch, 2, 0.1, batch)
    train(DpTraining(session.model, session.task.losses, records, terms, Randomness.from_os()))


def planned(shape: str, folder: Path) -> dict[str, float]:
    """Returns the plan's peaks over the imports in MB, by phase."""
    from offsite.adapter.spec import AdapterSpec
    from offsite.coordinator.plan.make_plan import Planner
    from offsite.coordinator.plan.model_outline import read_outline
    from offsite.coordinator.plan.paper_package import Design
    from offsite.coordinator.plan.request import STORED, WIDENED, PlanRequest
    from offsite.coordinator.plan.trial import Batches

    batch, length = EXAMPLES[shape]
    request = PlanRequest(adapter=AdapterSpec("ffa_lora", rank=4, alpha=8.0), batches=Batches(length, batch), scored=2)
    planner, design = Planner(read_outline(folder / "model"), request), Design(recipe=("int4:64",))
    peaks = dict[str, int]()
    for weights, words in ((WIDENED, ""), (STORED, " stored")):
        site = planner.site(design, weights=weights)
        peaks[f"open{words}"] = max(site.opening(None).memory, site.vetting(None).memory)
        peaks[f"step{words}"] = site.step(None).memory
    peaks["prepare"] = max(phase.memory for phase in planner.coordinator(site).phases(None)[:3])
    short = replace(planner, request=replace(request, batches=Batches(BUILD_LENGTH, 2)))
    peaks["build"] = short.coordinator(short.site(design)).streamed()
    return {name: value / 1e6 for name, value in peaks.items()}


def main() -> None:
    """Prints a table of both numbers for every phase, and exits with 1 where one misses the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--phase")
    given = parser.parse_args()
    if given.phase:
        run_phase(given.phase, given.shape[0], given.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        misses = [_compare(shape, (given.folder or Path(temporary)) / shape) for shape in given.shape or SHAPES]
    sys.exit(1 if any(misses) else 0)


def _compare(shape: str, folder: Path) -> int:
    """Prints the rows of one shape, and returns the number of rows that miss the bar."""
    if not (folder / "model").is_dir():
        make_model(folder / "model", shape)
    plan, misses = planned(shape, folder), 0
    for phase in PHASES:
        words = ["--phase", phase, "--shape", shape, "--folder", str(folder)]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "bench.plan_memory", *words],
            capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            print(f"{shape:5} {phase:12} failed: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}", flush=True)
            misses += 1
            continue
        if phase in UNCOMPARED:
            continue
        measured = float(done.stdout.splitlines()[-1])
        off = plan[phase] / measured - 1
        misses += abs(off) > BAR
        print(
            f"{shape:5} {phase:12} planned {plan[phase]:7.0f} MB, measured {measured:7.0f} MB, {off:+.1%}", flush=True
        )
    return misses


if __name__ == "__main__":
    main()
