"""The subjects of the emulator bench: two real models, each with its task, its adapter and its recipes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.encoder import HiddenWords, fetch, with_head
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.evaluation.rehearse import Lesson, Text
from offsite.emulator.structure.geometry import Geometry
from offsite.task.readers.columns import columns_of
from offsite.task.readers.tables import read
from offsite.task.selection import spread
from offsite.task.splits import JOINED
from offsite.task.tasks import TASKS

DOMAINS = ("abraham-lincoln", "andrew-jackson", "ronald-reagan")
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PUBLIC_PARTS = (64, 16, 128, 32, 1024)  # examples for fits, gate, adapters, scores and an attacker; none serves two
HEAD_EXAMPLES = 2048


@dataclass(frozen=True)
class Recipe:
    """One emulator of the bench.

    Attributes:
      shape: "sandwich" or "parallel".
      steps: compressors, in order.
      embedding: storage of the word tables.
      ends: number of blocks shipped verbatim at each end; None takes the number of the model's `Kind`.
    """

    shape: str
    steps: tuple[str, ...]
    embedding: str = "int8"
    ends: int | None = None


Recipes = dict[str, Recipe]


@dataclass(frozen=True)
class Kind:
    """One model of the bench.

    Attributes:
      title: name of the model in the report.
      folder: function that returns the model's folder for a cache folder, and makes the model's folder if missing.
      task: task of the model.
      ends: number of slots' blocks at each end.
      length: tokens in an example.
      targets: names of the layers that carry adapters.
      batch: examples in a step of the adapter's training.
      rate: learning rate of the adapter's training with Adam.
      recipes: recipes of the bench, by name.
    """

    title: str
    folder: Callable[[Path], Path]
    task: Any
    ends: int
    length: int
    targets: tuple[str, ...]
    batch: int
    rate: float
    recipes: Recipes


@dataclass(frozen=True)
class Subject:
    """One model of the bench with its texts.

    Attributes:
      kind: the model's entry in the table.
      model: the full model, float32.
      folder: folder of the model.
      public: public examples for fits.
      gate: public examples for the gate.
      public_text: public examples for rehearsals, by purpose.
      sites: folder of the owners' texts.
    """

    kind: Kind
    model: Any
    folder: Path
    public: PublicExamples
    gate: PublicExamples
    public_text: Text
    sites: Path

    @classmethod
    def open(cls, kind: Kind, cache: Path) -> "Subject":
        """Returns the subject of a kind, from the files that `offsite prepare` fetched."""
        folder = kind.folder(cache)
        examples = public_examples(kind.task, folder, cache, kind.length)
        fit, gate, *rest = (
            PublicExamples(kind.task, spread(examples, count, offset=i, stride=len(PUBLIC_PARTS)))
            for i, count in enumerate(PUBLIC_PARTS)
        )
        model = kind.task.load(folder, dtype=torch.float32)
        return cls(kind, model, folder, fit, gate, Text(*rest, kind.length), cache / "data" / "sites")

    def geometry(self, shape: str, ends: int | None = None) -> Geometry:
        """Returns the geometry of a shape, with so many verbatim blocks at each end; None takes the kind's number."""
        count = self.kind.ends if ends is None else ends
        return Geometry.of(self.model, count, count, shape)

    def lesson(self, shape: str, seed: int) -> Lesson:
        """Returns the adapter's training: LoRA of rank 8 on every dense layer of the slots, Adam, no privacy."""
        slots = self.geometry(shape).slots(self.model)
        spec = AdapterSpec("lora", rank=8, alpha=16.0, targets=self.kind.targets, slots=slots, seed=seed)
        return Lesson(spec, steps=30, batch=self.kind.batch, learning_rate=self.kind.rate, seed=seed)

    def domain(self, name: str) -> Text:
        """Returns an owner's text for training and scores; an attacker relearns on public text."""
        task, tokenizer = self.kind.task, self.kind.task.load_processor(self.folder)
        parts = []
        for split, count in (("train", 128), ("heldout", 32)):
            texts = read(self.sites / name / split, reader=None, columns=columns_of(task.columns, names={}))
            examples = task.encode(
                tokenizer, texts, length=self.kind.length, split=JOINED, model_config=self.model.config
            )
            parts.append(PublicExamples(task, spread(examples, count)))
        return Text(parts[0], parts[1], self.public_text.attack, self.kind.length)


def public_examples(task: Any, folder: Path, cache: Path, length: int) -> Any:
    """Returns Moby-Dick as examples."""
    texts = read(cache / "data" / "public", reader=None, columns=columns_of(task.columns, names={}))
    return task.encode(task.load_processor(folder), texts, length=length, split=JOINED, model_config=None)


def _smollm(cache: Path) -> Path:
    return cache / "models" / "smollm2-135m-instruct"


def _minilm(cache: Path) -> Path:
    encoder, task = fetch(cache), HiddenWords()
    examples = spread(public_examples(task, encoder, cache, 64), HEAD_EXAMPLES)
    return with_head(encoder, examples, cache / "models" / "minilm-l6-hidden-words")


# The first two are bad on purpose.
SMOLLM: Recipes = {
    "none": Recipe("sandwich", ("skip_uniform:1",)),
    "uniform 50 %": Recipe("sandwich", ("skip_uniform:0.5",)),
    "importance 50 %": Recipe("sandwich", ("skip_importance:0.5",)),
    "importance 50 % + refit": Recipe("sandwich", ("skip_importance:0.5", "refit")),
    "low rank 50 %": Recipe("sandwich", ("lowrank:0.5",)),
    "gradient 50 % + narrow 1/3": Recipe("sandwich", ("skip_gradient:0.5", "narrow:0.3333")),
    "narrow 1/2": Recipe("sandwich", ("narrow:0.5",)),
    "narrow 1/3": Recipe("sandwich", ("narrow:0.3333",)),
    "narrow 1/3 + gptq4": Recipe("sandwich", ("narrow:0.3333", "gptq4:128", "center")),
    "narrow 1/8 + gptq4": Recipe("sandwich", ("narrow:0.125", "gptq4:128")),
    "int4": Recipe("sandwich", ("int4:128",)),
    "gptq4 + center": Recipe("sandwich", ("gptq4:128", "center")),
    "gptq3": Recipe("sandwich", ("gptq3:64",)),
    "parallel gptq4": Recipe("parallel", ("gptq4:32/6", "center")),
    # The smallest: no block verbatim; three bits, but four for the outermost blocks and those whose absence harms most.
    "parallel 3-4 bits": Recipe(
        "parallel",
        ("gptq4:32/6@0-2,8,11,24,28-29", "gptq3:32/6@3-7,9-10,12-23,25-27", "center"),
        embedding="int4:32/6",
        ends=0,
    ),
}
MINILM: Recipes = {
    "none": Recipe("sandwich", ("skip_uniform:1",)),
    "uniform 50 %": Recipe("sandwich", ("skip_uniform:0.5",)),
    "importance 50 %": Recipe("sandwich", ("skip_importance:0.5",)),
    "importance 25 % + refit": Recipe("sandwich", ("skip_importance:0.25", "refit")),
    "low rank 50 %": Recipe("sandwich", ("lowrank:0.5",)),
    "low rank 25 %": Recipe("sandwich", ("lowrank:0.25",)),
    "narrow 1/2": Recipe("sandwich", ("narrow:0.5",)),
    "narrow 1/4": Recipe("sandwich", ("narrow:0.25",)),
    "narrow 1/16": Recipe("sandwich", ("narrow:0.0625",)),
    "prune 50 %": Recipe("sandwich", ("prune:0.5",)),
    "int4": Recipe("sandwich", ("int4:128",)),
    "int3": Recipe("sandwich", ("int3:128",)),
    "gptq4 + center": Recipe("sandwich", ("gptq4:128", "center")),
    "gptq3": Recipe("sandwich", ("gptq3:64",)),
}
KINDS = {
    "smollm2": Kind("SmolLM2-135M", _smollm, TASKS["causal_lm"], 2, 128, LAYERS, 4, 1e-3, SMOLLM),
    "minilm": Kind("MiniLM-L6", _minilm, HiddenWords(), 1, 64, ("query", "value", "dense"), 8, 1e-3, MINILM),
}
