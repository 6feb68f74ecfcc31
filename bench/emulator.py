"""Transfer, leak, bytes and compute of emulators on real text, beside the gate that would have judged them before.

`python -m bench.emulator --cache ~/.cache/offsite --out runs/emulator` builds every recipe of the table on SmolLM2-135M
with public text (Moby-Dick), trains the adapter on it with the text of an owner (State of the Union), plugs it in and
scores everything on that owner's held-out text. Dev case: abraham-lincoln, seed 0; nothing was chosen on the others.
Results are kept line by line, so a stopped run goes on.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapter.layout import Layout
from adapter.spec import AdapterSpec
from bench.emulator_report import write_report
from client.data import read
from coordinator.evaluate import spread
from emulator import package
from emulator.calibrate import PublicExamples
from emulator.correct import repaired
from emulator.fidelity import gradient_cosine, visiting
from emulator.geometry import Geometry
from emulator.middle import Calibration
from emulator.plug import plug, take
from emulator.rehearse import Lesson, Reference, Text, reference, rehearse, train
from emulator.source import MemorySource
from task.tasks import TASKS

MODEL = "smollm2-135m-instruct"
DOMAINS = ("abraham-lincoln", "andrew-jackson", "ronald-reagan")
LENGTH, STEPS, BATCH, RATE = 128, 30, 4, 1e-3
# name -> (shape, recipe); the first two are bad on purpose, the third is the model itself
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "none": ("sandwich", ("skip_uniform:1",)),
    "uniform 50 %": ("sandwich", ("skip_uniform:0.5",)),
    "whole": ("sandwich", ()),
    "int4": ("sandwich", ("int4:128",)),
    "gptq4": ("sandwich", ("gptq4:128",)),
    "gptq4 + center": ("sandwich", ("gptq4:128", "center")),
    "gptq3": ("sandwich", ("gptq3:64",)),
    "importance 50 %": ("sandwich", ("skip_importance:0.5",)),
    "importance 50 % + refit": ("sandwich", ("skip_importance:0.5", "refit")),
    "gradient 50 % + refit": ("sandwich", ("skip_gradient:0.5", "refit")),
    "low rank 50 %": ("sandwich", ("lowrank:0.5",)),
    "narrow 1/3": ("sandwich", ("narrow:0.3333",)),
    "narrow 1/3 + gptq4": ("sandwich", ("narrow:0.3333", "gptq4:128")),
    "narrow 1/8 + gptq4": ("sandwich", ("narrow:0.125", "gptq4:128")),
    "8 of 26 narrowed": ("sandwich", ("skip_importance:0.69", "narrow:0.5", "gptq4:128")),
    "parallel gptq4": ("parallel", ("gptq4:128",)),
}


@dataclass(frozen=True)
class Setting:
    """One bench: the model, its texts and how long adapters are trained."""

    model: Any
    folder: Path
    public: PublicExamples
    gate: PublicExamples
    public_text: Text
    sites: Path
    out: Path

    def domain(self, name: str) -> Text:
        """Returns an owner's text: trained on, scored on; an attacker relearns on public text."""
        task, tokenizer = TASKS["causal_lm"], TASKS["causal_lm"].load_tokenizer(self.folder)
        parts = []
        for split, count in (("train", 128), ("heldout", 32)):
            texts = read(self.sites / name / split, reader=None, column=None)
            examples = task.encode(tokenizer, texts, length=LENGTH, split="blocks")
            parts.append(PublicExamples(task, spread(examples, count)))
        return Text(parts[0], parts[1], self.public_text.attack)


def lesson(geometry: Geometry, model: Any, seed: int) -> Lesson:
    """Returns how the adapter is trained: LoRA of rank 8 on every dense layer of the slots, Adam, no privacy."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    spec = AdapterSpec("lora", rank=8, alpha=16.0, targets=targets, slots=geometry.slots(model), seed=seed)
    return Lesson(spec, steps=STEPS, batch=BATCH, learning_rate=RATE, seed=seed)


def open_setting(cache: Path, out: Path) -> Setting:
    """Returns the bench over what `offsite prepare` fetched."""
    folder, task = cache / "models" / MODEL, TASKS["causal_lm"]
    examples = task.encode(
        task.load_tokenizer(folder),
        read(cache / "data" / "public", reader=None, column=None),
        length=LENGTH,
        split="blocks",
    )
    parts = [
        PublicExamples(task, spread(examples, count, offset=i, stride=5))
        for i, count in enumerate((64, 16, 128, 32, 1024))
    ]
    model = task.load(folder, dtype=torch.float32)
    return Setting(model, folder, parts[0], parts[1], Text(parts[2], parts[3], parts[4]), cache / "data" / "sites", out)


@dataclass
class Bench:
    """The run: what was measured stands in `lines`, by its key."""

    setting: Setting
    lines: dict[str, dict[str, Any]]
    relearn: tuple[int, ...]

    def measure(self, names: list[str], domains: list[str], seeds: list[int]) -> Iterator[dict[str, Any]]:
        """Yields one line for each emulator, then for each emulator, domain and seed."""
        for name in names:
            shape, recipe = RECIPES[name]
            geometry = Geometry.of(self.setting.model, 2, 2, shape)
            emulator, facts = self._emulator(name, geometry, recipe)
            yield facts
            for domain in domains:
                for seed in seeds:
                    yield self._case(name, geometry, emulator, domain, seed)

    def _emulator(self, name: str, geometry: Geometry, recipe: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
        """Builds a package, or opens the one of an earlier run, and holds it against the gate."""
        setting = self.setting
        folder = setting.out / "packages" / name.replace(" ", "_").replace("/", "-").replace("%", "pc")
        key = f"emulator|{name}"
        known = self.lines.get(key, {})
        if not (folder / "manifest.json").is_file():
            began, cpu = time.perf_counter(), time.process_time()
            source = MemorySource(setting.model)
            package.build(
                source, geometry, recipe, "int8", Calibration(setting.public.run, setting.gate.losses), folder
            )
            known = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        manifest = package.read_manifest(folder)
        emulator = package.load(folder, dtype=torch.float32)
        if "cosine" not in known:
            plan = lesson(geometry, setting.model, 0)
            cosine = gradient_cosine(setting.model, emulator, plan.spec, setting.gate.losses)
            test = setting.public_text.test
            known |= {
                "cosine": cosine,
                "public_loss": test.loss(emulator),
                "full_public_loss": test.loss(setting.model),
            }
            known["public"] = self._public(geometry, emulator)
        return emulator, {
            "key": key,
            "name": name,
            "shape": geometry.shape,
            "recipe": list(recipe),
            "bytes": manifest.shipped_bytes,
            "full_bytes": manifest.full_bytes,
            "middle_ratio": manifest.middle_ratio,
            "compute_ratio": manifest.compute_ratio,
            "verbatim": manifest.verbatim,
            **known,
        }

    def _public(self, geometry: Geometry, emulator: Any) -> float:
        """Returns the transfer in a rehearsal on public text: the predictor."""
        plan, text = lesson(geometry, self.setting.model, 0), self.setting.public_text
        known = self._reference(geometry, "public", text, plan)
        return rehearse(self.setting.model, emulator, plan, text, known).transfer

    def _reference(self, geometry: Geometry, domain: str, text: Text, plan: Lesson) -> Reference:
        key = f"reference|{geometry.shape}|{domain}|{plan.seed}"
        if key not in self.lines:
            found = reference(self.setting.model, plan, text)
            self.lines[key] = {"key": key, "zero_shot": found.zero_shot, "slot_tuned": found.slot_tuned}
            keep(self.setting.out, self.lines[key])
        line = self.lines[key]
        return Reference(line["zero_shot"], line["slot_tuned"])

    def _case(self, name: str, geometry: Geometry, emulator: Any, domain: str, seed: int) -> dict[str, Any]:
        key = f"case|{name}|{domain}|{seed}"
        if key in self.lines:
            return self.lines[key]
        setting, text = self.setting, self.setting.domain(domain)
        plan = lesson(geometry, setting.model, seed)
        known = self._reference(geometry, domain, text, plan)
        relearn = self.relearn if seed == 0 else ()
        with visiting(emulator, plan.spec) as model:
            layout = Layout.of(model)
            start = torch.from_numpy(layout.read(model))
            train(model, plan, text.train)
            tuned, vector = text.test.loss(model), torch.from_numpy(layout.read(model))
        losses = self._plugged(geometry, emulator, plan, layout, start, vector, text)
        line = {
            "key": key,
            "name": name,
            "domain": domain,
            "seed": seed,
            "zero_shot": known.zero_shot,
            "slot_tuned": known.slot_tuned,
            "emulator_tuned": tuned,
            **losses,
        }
        if relearn:
            found = rehearse(setting.model, emulator, plan, text, known, relearn=relearn)
            line["relearned"] = {str(tokens): loss for tokens, loss in found.relearned.items()}
        return line

    def _plugged(
        self,
        geometry: Geometry,
        emulator: Any,
        plan: Lesson,
        layout: Layout,
        start: torch.Tensor,
        vector: torch.Tensor,
        text: Text,
    ) -> dict[str, Any]:
        """Returns the loss of the plug-in as it came, and of what the coordinator takes by public text alone."""
        public = self.setting.public_text.test
        with visiting(self.setting.model, plan.spec) as full:

            def at(candidate: torch.Tensor, examples: PublicExamples) -> float:
                plug(full, layout, candidate.numpy())
                return examples.loss(full)

            before = at(start, public)
            # A new domain may cost a little on public text; what is taken may not cost more than this.
            scale, _, verdict = take(before, lambda s: at(start + s * (vector - start), public), 0.05)
            taken = start + scale * (vector - start) if verdict.accepted else start
            losses = {"plug_in": at(vector, text.test), "taken": at(taken, text.test)}
            losses |= {"scale": scale if verdict.accepted else 0.0}
            if geometry.shape == "parallel":
                plug(full, layout, vector.numpy())
                losses["corrected"] = at(repaired(full, emulator, 1.0), text.test)
        return losses


def keep(out: Path, line: dict[str, Any]) -> None:
    """Adds a line to the results."""
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    """Runs what is not there yet, and writes the report over all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "offsite")
    parser.add_argument("--out", type=Path, default=Path("runs/emulator"))
    parser.add_argument("--only", nargs="*", default=list(RECIPES), help="names of recipes")
    parser.add_argument("--domains", nargs="*", default=list(DOMAINS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--relearn", nargs="*", type=int, default=[10_000])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.jsonl"
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    lines = {line["key"]: line for line in known}
    bench = Bench(open_setting(arguments.cache, arguments.out), lines, tuple(arguments.relearn))
    for line in bench.measure(arguments.only, arguments.domains, arguments.seeds):
        if lines.get(line["key"]) != line:
            lines[line["key"]] = line
            keep(arguments.out, line)
            shown = {name: round(v, 3) for name, v in line.items() if isinstance(v, float) and math.isfinite(v)}
            print(line["key"], shown, flush=True)
    write_report(arguments.out, list(lines.values()))
    print(f"report: {arguments.out / 'report.md'}")


if __name__ == "__main__":
    main()
