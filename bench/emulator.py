"""Transfer, leak, bytes and compute of emulators on real text, beside the gate's judgement before any training.

`python -m bench.emulator --cache ~/.cache/offsite --out runs/emulator` builds every recipe of a model's table
(`--model smollm2` or `minilm`) with public text (Moby-Dick), trains the adapter on the emulator with an owner's text
(State of the Union), plugs the adapter in, and scores all models on that owner's held-out text. The development case is
abraham-lincoln, seed 0; nothing was chosen on the other cases. Results are kept line by line, so a stopped run goes on.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.emulator_report import write_report
from bench.subjects import DOMAINS, KINDS, Recipe, Subject
from offsite.adapter.layout import Layout
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.calibration.source import MemorySource
from offsite.emulator.evaluation.fidelity import gradient_cosine, visiting
from offsite.emulator.evaluation.rehearse import Lesson, Reference, Text, reference, rehearse, relearned_loss, train
from offsite.emulator.package import package_reader
from offsite.emulator.runtime.correction import repaired
from offsite.emulator.runtime.plug_in import plug, take

# A new domain may cost a little on public text: largest accepted rise of the public loss, nats per token.
TOLERANCE = 0.05


@dataclass(frozen=True)
class TunedAdapter:
    """An adapter before and after its training on an emulator.

    Attributes:
      layout: layout of the adapter.
      start: values before the training, float32 (layout.size,).
      vector: values after the training, float32 (layout.size,).
    """

    layout: Layout
    start: torch.Tensor
    vector: torch.Tensor


@dataclass
class Bench:
    """One run of the bench.

    Attributes:
      subject: the model with its texts.
      out: folder of the packages and results.
      lines: measured results, by key.
      relearn: numbers of tokens on which an attacker relearns.
      rehearsed: True to rehearse each emulator on public text as well.
    """

    subject: Subject
    out: Path
    lines: dict[str, dict[str, Any]]
    relearn: tuple[int, ...]
    rehearsed: bool = False
    _public: float | None = None

    def measure(self, names: list[str], domains: list[str], seeds: list[int]) -> Iterator[dict[str, Any]]:
        """Yields, for each emulator, a line of facts and then a line for each domain and seed."""
        for name in names:
            recipe = self.subject.kind.recipes[name]
            emulator, facts = self._emulator(name, recipe)
            yield facts
            for domain in domains:
                for seed in seeds:
                    yield self._case(name, recipe.shape, emulator, domain, seed)

    def _emulator(self, name: str, recipe: Recipe) -> tuple[Any, dict[str, Any]]:
        """Returns an emulator and its facts; builds the package, or opens the package of an earlier run."""
        folder = self.out / "packages" / name.replace(" ", "_").replace("/", "-").replace("%", "pc")
        key = f"emulator|{name}"
        known = self.lines.get(key, {})
        if not (folder / "manifest.json").is_file():
            known = self._build(recipe, folder)
        manifest = package_reader.read_manifest(folder)
        emulator = package_reader.load(folder, dtype=torch.float32)
        if "cosine" not in known:
            known = known | self._judged(recipe.shape, emulator)
        return emulator, {
            "key": key,
            "name": name,
            "shape": recipe.shape,
            "recipe": list(recipe.steps),
            "bytes": manifest.shipped_bytes,
            "full_bytes": manifest.full_bytes,
            "middle_ratio": manifest.middle_ratio,
            "compute_ratio": manifest.compute_ratio,
            "verbatim": manifest.verbatim,
            **known,
        }

    def _build(self, recipe: Recipe, folder: Path) -> dict[str, Any]:
        subject = self.subject
        calibration = Calibration(subject.public.run, subject.gate.losses)
        shutil.rmtree(folder, ignore_errors=True)  # a package of a run that was stopped in the middle
        began, cpu = time.perf_counter(), time.process_time()
        geometry = subject.geometry(recipe.shape, recipe.ends)
        write_package(
            MemorySource(subject.model), EmulatorDesign(geometry, recipe.steps, recipe.embedding), calibration, folder
        )
        return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}

    def _judged(self, shape: str, emulator: Any) -> dict[str, Any]:
        """Returns the facts known before any site trains: the gate's cosine, the emulator's loss, a rehearsal's G."""
        subject = self.subject
        plan, text = subject.lesson(shape, 0), subject.public_text
        facts = {
            "cosine": gradient_cosine(subject.model, emulator, plan.spec, subject.gate.losses),
            "public_loss": text.test.loss(emulator),
        }
        if self.rehearsed:
            known = self._reference(shape, "public", text, plan)
            facts["public"] = rehearse(subject.model, emulator, plan, text, known).transfer
        return facts

    def _reference(self, shape: str, domain: str, text: Text, plan: Lesson) -> Reference:
        key = f"reference|{shape}|{domain}|{plan.seed}"
        if key not in self.lines:
            known = reference(self.subject.model, plan, text)
            self.lines[key] = {"key": key, "zero_shot": known.zero_shot, "slot_tuned": known.slot_tuned}
            keep(self.out, self.lines[key])
        line = self.lines[key]
        return Reference(line["zero_shot"], line["slot_tuned"])

    def _case(self, name: str, shape: str, emulator: Any, domain: str, seed: int) -> dict[str, Any]:
        key = f"case|{name}|{domain}|{seed}"
        relearn = self.relearn if seed == 0 else ()
        line = self.lines.get(key, {})
        missing = tuple(tokens for tokens in relearn if str(tokens) not in line.get("relearned", {}))
        if line and not missing:
            return line
        subject, text = self.subject, self.subject.domain(domain)
        plan = subject.lesson(shape, seed)
        known = self._reference(shape, domain, text, plan)
        if not line:
            line = {"key": key, "name": name, "domain": domain, "seed": seed}
            line |= {"zero_shot": known.zero_shot, "slot_tuned": known.slot_tuned}
            line |= self._exchanged(shape, emulator, plan, text)
        if missing:
            losses = {str(tokens): relearned_loss(emulator, plan, text, tokens) for tokens in missing}
            line = {**line, "relearned": {**line.get("relearned", {}), **losses}}
        return line

    def _exchanged(self, shape: str, emulator: Any, plan: Lesson, text: Text) -> dict[str, Any]:
        """Trains on the emulator and returns all losses on the owner's held-out text."""
        with visiting(emulator, plan.spec) as model:
            layout = Layout.of(model)
            start = torch.from_numpy(layout.read(model))
            train(model, plan, text.train)
            loss, tuned = text.test.loss(model), TunedAdapter(layout, start, torch.from_numpy(layout.read(model)))
        return {"emulator_tuned": loss, **self._plugged(shape, emulator, plan, tuned, text)}

    def _plugged(self, shape: str, emulator: Any, plan: Lesson, tuned: TunedAdapter, text: Text) -> dict[str, Any]:
        """Returns the losses of the whole plug-in, and of the share that the coordinator takes by public text alone."""
        public, start, vector = self.subject.public_text.test, tuned.start, tuned.vector
        with visiting(self.subject.model, plan.spec) as full:

            def at(candidate: torch.Tensor, examples: Any) -> float:
                plug(full, tuned.layout, candidate.numpy())
                return float(examples.loss(full))

            if self._public is None:  # an adapter at its start changes nothing, whatever the seed
                self._public = at(start, public)
            scale, _, verdict = take(self._public, lambda s: at(start + s * (vector - start), public), TOLERANCE)
            plug_in = at(vector, text.test)
            taken = start + scale * (vector - start)
            losses = {"plug_in": plug_in, "scale": scale if verdict.accepted else 0.0}
            whole = verdict.accepted and scale == 1
            losses["taken"] = plug_in if whole else at(taken if verdict.accepted else start, text.test)
            if shape == "parallel":
                plug(full, tuned.layout, vector.numpy())
                losses["corrected"] = at(repaired(full, emulator, 1.0), text.test)
        return losses


def keep(out: Path, line: dict[str, Any]) -> None:
    """Appends a line to the file of results."""
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    """Runs the missing cases, and writes the report over all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "offsite")
    parser.add_argument("--out", type=Path, default=Path("runs/emulator"), help="parent of the folders of the models")
    parser.add_argument("--model", choices=list(KINDS), default="smollm2")
    parser.add_argument("--only", nargs="*", help="names of recipes; default: all")
    parser.add_argument("--domains", nargs="*", default=list(DOMAINS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--rehearse", action="store_true", help="also rehearse each emulator on public text")
    parser.add_argument("--relearn", nargs="*", type=int, default=[10_000])
    arguments = parser.parse_args()
    kind, out = KINDS[arguments.model], arguments.out / arguments.model
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    lines = {line["key"]: line for line in known}
    bench = Bench(Subject.open(kind, arguments.cache), out, lines, tuple(arguments.relearn), arguments.rehearse)
    for line in bench.measure(arguments.only or list(kind.recipes), arguments.domains, arguments.seeds):
        if lines.get(line["key"]) != line:
            lines[line["key"]] = line
            keep(out, line)
            shown = {name: round(v, 3) for name, v in line.items() if isinstance(v, float) and math.isfinite(v)}
            print(line["key"], shown, flush=True)
    write_report(out, kind.title, list(lines.values()))
    print(f"report: {out / 'report.md'}")


if __name__ == "__main__":
    main()
