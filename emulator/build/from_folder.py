"""From a model's folder and a file of public records to an emulator's package: what `offsite emulator build` runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from offsite.emulator.build.pipeline import BuildPipeline, Built, Order, Public
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.calibration.source import MemorySource, ShardSource, Source
from offsite.emulator.evaluation.rehearse import Text
from offsite.errors import DataError, UnsupportedModel, lookup
from offsite.task.checkpoint import check_memory
from offsite.task.device import AUTO, choose_device
from offsite.task.findings import Findings
from offsite.task.model_check import ModelClass, check_class, check_files
from offsite.task.readers.columns import columns_of
from offsite.task.readers.tables import read
from offsite.task.records import without_empty
from offsite.task.selection import spread
from offsite.task.spec import Batch, Task
from offsite.task.splits import JOINED
from offsite.task.tasks import TASKS

GATE, TRAIN, TEST, ATTACK = 16, 128, 32, 1024  # examples at most, beside those for calibration
TEST_EXAMPLES = 32  # at least, for gate, training, test and attack together


@dataclass(frozen=True)
class PublicData:
    """The model owner's own records, which an emulator is fitted to and judged on.

    Attributes:
      path: file, or folder of text files.
      task: name in `task.tasks.TASKS`.
      columns: column of each field of the task's records, where the column is not named as the field.
      sequences: number of examples that compressors look at.
      length: number of tokens of an example, at most.
    """

    path: Path
    task: str = "causal_lm"
    columns: dict[str, str] = field(default_factory=dict)
    sequences: int = 64
    length: int = 128


def build_from_folder(
    model: Path,
    out: Path,
    order: Order,
    data: PublicData,
    on_step: Callable[[str], None] = lambda text: None,
    *,
    device: str = AUTO,
) -> Built:
    """Builds an emulator within an order's limits, and leaves nothing behind where the order cannot be met.

    Args:
      model: folder of the full model, with safetensors.
      out: package folder to write; missing or empty.
      order: geometry, recipe or limits, and the adapter that will be trained.
      data: public records.
      on_step: receives a sentence about each step.
      device: device that computes, see `task.device.choose_device`.

    Raises:
      CheckFailed: the model's files, its tokenizer or the length do not fit each other.
      ConfigError: the limits cannot be met, the emulator's gradients point elsewhere, or there is no such device.
      DataError: a file is missing, or there are too few records.
      UnsupportedModel: the model has no tower of alike blocks.
    """
    lookup(TASKS, data.task, "task")
    checked = _checked(model, data, on_step)
    where = choose_device(device)
    task, source = checked.task, open_source(checked.task, model, on_step, where)
    on_step(f"read {data.path}")
    examples = _examples(task, source, checked.processor, data)
    return BuildPipeline(source, order, _public(task, examples, data), model, on_step).build(out)


def _checked(model: Path, data: PublicData, on_step: Callable[[str], None]) -> ModelClass:
    """Returns the model as transformers sees it, after the same check as before a run.

    Raises:
      CheckFailed: files of the model, or its positions, do not fit; each fault is a line.
    """
    findings = Findings()
    files = check_files(data.task, model, findings)
    checked = None if findings.errors else check_class(data.task, model, data.length, files, findings)
    for warning in findings.warnings:
        on_step(f"warning: {warning}")
    findings.check()
    if checked is None:
        raise DataError(f"model={str(model)!r} cannot be used; give another folder")
    return checked


def open_source(task: Task, model: Path, on_step: Callable[[str], None], device: torch.device) -> Source:
    """Returns the full model on a device, read block by block where its checkpoint allows this, else loaded whole."""
    on_step(f"open the model, device={device}")
    try:
        return ShardSource(model, torch.float32, device)
    except UnsupportedModel as error:
        on_step(f"the whole model is loaded: {error}")
        check_memory(model, device)
        return MemorySource(task.load(model, dtype=torch.float32).to(device))


def _examples(task: Task, source: Source, processor: Any, data: PublicData) -> Batch:
    """Returns the records as examples; plain texts are joined and cut, so that no example is mostly padding."""
    records = read(data.path, reader=None, columns=columns_of(task.columns, names=data.columns))
    split = JOINED if tuple(task.columns) == ("text",) else "truncate"
    config = source.model.config
    examples = task.encode(processor, records, length=data.length, split=split, model_config=config)
    examples = without_empty(examples, records, split)
    return examples.select(torch.nonzero(examples.targets))


def _public(task: Task, examples: Batch, data: PublicData) -> Public:
    """Splits the examples by purpose: every fifth example for each, so that no example is learnt from and tested on."""
    needed = data.sequences + TEST_EXAMPLES
    if len(examples) < needed:
        raise DataError(
            f"calibration: {len(examples)} examples of {data.length} tokens, {needed} are needed; give more public "
            "data, or smaller --sequences or --length"
        )
    calibration, gate, train, test, attack = (
        PublicExamples(task, spread(examples, count, offset=i, stride=5))
        for i, count in enumerate((data.sequences, GATE, TRAIN, TEST, ATTACK))
    )
    return Public(calibration, gate, Text(train=train, test=test, attack=attack, length=data.length))
