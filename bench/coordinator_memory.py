"""Peak memory of the coordinator's whole job on a model in the shape of one of 1.1 billion parameters, by phase.

`python -m bench.coordinator_memory` writes a random model in bfloat16 (2.2 GB) and, in a process of its own, prepares a
job, plugs an adapter in, scores it, opens the emulator and exports. It prints JSON: for each phase the peak over the
imports in MB, of memory that only the process has (RssAnon) and of resident pages of mapped files (RssFile), which the
system takes back when it needs them. `--whole` loads the model as before blocks rested in the format of their files.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench.emulator_cost import BILLION

WORDS = [f"w{i}" for i in range(60)]
FED = """
[model]
path = "model"
[data]
public = "public.jsonl"
length = 8
split = "truncate"
[coordinator]
home = "home"
[emulator]
first = {first}
last = {first}
compress = {recipe}
gate = -1.0
[training]
rounds = 1
batch = 8
physical_batch = 4
[evaluation]
public_examples = 4
"""


def write_world(folder: Path, blocks: int) -> None:
    """Writes model, tokenizer and public records."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**{**BILLION, "num_hidden_layers": blocks})).save_pretrained(folder / "model")
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder / "model")
    lines = [json.dumps({"text": " ".join(WORDS[(i * 7 + j * j) % 60] for j in range(8))}) for i in range(40)]
    (folder / "public.jsonl").write_text("\n".join(lines) + "\n")


class Phases:
    """Peak of RssAnon and RssFile in each phase, in bytes over the first reading; a thread reads every 5 ms."""

    def __init__(self) -> None:
        self.peaks: dict[str, dict[str, int]] = {}
        self._start, self._name, self._began = _resident(), "", time.monotonic()
        self.seconds: dict[str, float] = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def begin(self, name: str) -> None:
        """Begins the next phase."""
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + time.monotonic() - self._began
        if self._name:
            print(self._name, self.peaks.get(self._name), round(self.seconds[self._name]), file=sys.stderr, flush=True)
        self._name, self._began = name, time.monotonic()

    def _watch(self) -> None:
        while True:
            now = _resident()
            over = {key: now[key] - self._start[key] for key in now} | {"both": sum(now.values()) - self._total}
            peak = self.peaks.setdefault(self._name, dict.fromkeys(over, 0))
            for key, value in over.items():
                peak[key] = max(peak[key], value)
            time.sleep(0.005)

    @property
    def _total(self) -> int:
        return sum(self._start.values())


def _resident() -> dict[str, int]:
    status = Path("/proc/self/status").read_text()
    return {key: int(re.search(rf"{key}:\s+(\d+)", status)[1]) * 1024 for key in ("RssAnon", "RssFile")}  # type: ignore[index]


def job(folder: Path, whole: bool) -> dict[str, Any]:
    """Runs the coordinator's part of a job of one round, and returns peaks and seconds by phase."""
    import numpy as np

    from offsite.adapter.export import export
    from offsite.coordinator.config.federation_file import read_config
    from offsite.coordinator.job import full_model, prepare
    from offsite.coordinator.job.public_records import read_records
    from offsite.coordinator.job.store import Store
    from offsite.coordinator.rounds.attempt import Attempts
    from offsite.coordinator.rounds.counter import MonotonicCounter
    from offsite.coordinator.rounds.emulator_refresh import DeployedEmulator
    from offsite.coordinator.rounds.round_loop import TrainingLoop

    if whole:
        _load_whole(full_model.OffloadedModel)
    config, store = read_config(folder / "fed.toml")[0], Store(folder / "run")
    roster = tuple((f"site-{n}", f"{n:064x}") for n in range(3))
    parties = prepare.Parties("bench", 1, roster, 3, 1)
    phases = Phases()
    opened = prepare.prepare(
        config,
        records=read_records(config, config.data.public),
        federation=parties,
        store=store,
        on_step=lambda text: phases.begin(text.split(":")[0].split(",")[0]),
    )
    phases.begin("plug-in and score")
    attempts = Attempts(store.folder, lambda: bytes(32), MonotonicCounter(store.folder / "count.txt"))
    loop = TrainingLoop(opened, config, store, attempts)
    progress = loop.start()
    tuned = opened.start + np.float32(1e-3) * np.random.default_rng(0).normal(size=opened.start.shape)
    loop.plug_in(tuned.astype(np.float32))
    phases.begin("score the emulator for the report")
    DeployedEmulator.open(store.package, opened).tuned(progress)
    phases.begin("export")
    export(opened.full, opened.manifest.adapter, store.adapter, base="./model", auxiliary=opened.given)
    phases.begin("end")
    megabytes = {name: {key: round(value / 1e6) for key, value in peak.items()} for name, peak in phases.peaks.items()}
    return {
        "peak_mb": {key: max(peak[key] for peak in megabytes.values()) for key in ("RssAnon", "RssFile", "both")},
        "phases": megabytes,
        "seconds": {name: round(value, 1) for name, value in phases.seconds.items() if name},
        "gradient_cosine": opened.emulator.cosine,
        "zero_shot": opened.zero_shot.loss,
        "emulator": opened.manifest.emulator,
    }


def _load_whole(kind: Any) -> None:
    """Lets the model be whole in float32 after the build, and all its weights in memory of its own before."""

    def start(self: Any, model: Any, device: Any) -> None:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        self.model, self.mapped_bytes = model.to(device), 0

    kind.__init__, kind.mapped_bytes = start, 0
    kind.compute_in = lambda self, dtype: self.model.to(dtype)
    kind._settle = lambda self: None


def main() -> None:
    """Measures one way, or, without --folder, both in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder of the model and of the runs; a temporary one by default")
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--first", type=int, default=2, help="verbatim blocks at each end")
    parser.add_argument("--recipe", nargs="*", default=["skip_uniform:0.5", "int4:64"])
    parser.add_argument("--whole", action="store_true", help="the model whole in memory, in float32 after the build")
    parser.add_argument("--step", choices=("write", "job"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "write":
        write_world(options.folder, options.blocks)
    elif options.step == "job":
        print(json.dumps(job(options.folder, options.whole), indent=1))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.folder or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            given = [sys.executable, "-m", "bench.coordinator_memory", *sys.argv[1:], "--folder", str(folder)]
            if not (folder / "public.jsonl").is_file():
                subprocess.run([*given, "--step", "write"], check=True)
            (folder / "fed.toml").write_text(FED.format(first=options.first, recipe=json.dumps(options.recipe)))
            with tempfile.TemporaryDirectory(dir=folder) as run:
                for name in ("model", "public.jsonl", "fed.toml"):
                    (Path(run) / name).symlink_to((folder / name).absolute())
                subprocess.run([*given, "--folder", run, "--step", "job"], check=True)


if __name__ == "__main__":
    main()
