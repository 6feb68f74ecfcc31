"""A job prepared block by block is the job of the model that is whole in memory: packages, gate, scores, start."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.coordinator.config.federation_file import FedConfig, read_config
from offsite.coordinator.job.evaluate import score
from offsite.coordinator.job.full_model import SPARE, needed_bytes
from offsite.coordinator.job.prepare import Job, Parties, prepare
from offsite.coordinator.job.public_records import read_records
from offsite.coordinator.job.store import Store
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.evaluation.fidelity import gradient_cosine
from offsite.emulator.package.package_reader import load
from offsite.task.tasks import TASKS
from tests.task_samples import first_of, write_records

PARTIES = Parties("test", 1, tuple((name, "0" * 64) for name in ("ash", "birch", "cedar")), 3, 1)
RECIPE = ["skip_gradient:0.3", "patch", "gptq4:16"]


def federation(folder: Path, task: str) -> FedConfig:
    """Writes a model in bfloat16, public records and a federation file."""
    sample = first_of(task)
    wide = TASKS[task].load(sample.save(folder / "wide"), dtype=torch.bfloat16)
    wide.save_pretrained(folder / "model")
    sample.save_processor(folder / "model")
    write_records(sample.records(40, 0), folder / "public.jsonl")
    (folder / "fed.toml").write_text(
        f'[model]\npath = "model"\ntask = "{task}"\n[data]\npublic = "public.jsonl"\nlength = {sample.length}\n'
        f'split = "truncate"\n[coordinator]\nhome = "home"\n[emulator]\nfirst = 1\nlast = 1\n'
        f"compress = {json.dumps(RECIPE)}\ngate = -1.0\n[training]\nbatch = 8\n"
    )
    return read_config(folder / "fed.toml")[0]


def by_hand(config: FedConfig, job: Job, folder: Path) -> tuple[str, float, float, Any]:
    """Returns package digest, gate cosine, score and adapter's start of the model that is whole in memory."""
    task, public, batch = TASKS[config.model.task], job.public, config.training.physical_batch
    full: nn.Module = task.load(config.model.path, dtype=torch.bfloat16)
    for parameter in full.parameters():
        parameter.data = parameter.data.clone()  # out of the mapped file
    spec, geometry = job.manifest.adapter, job.emulator.facts.geometry
    gate = PublicExamples(task, public.tune, gradients=8)
    facts = write_package(
        full,
        EmulatorDesign(geometry, tuple(config.emulator.compress), config.emulator.embedding),
        Calibration(PublicExamples(task, public.calibration, batch).run, gate.losses),
        folder,
        tokenizer=Path(config.model.path),
    )
    full = full.float()
    zero_shot = score(task, full, public.test, batch=batch).loss
    cosine = gradient_cosine(full, load(folder, dtype=torch.float32), spec, gate.losses)
    adapted = attach(full, spec)
    return facts.digest(), cosine, zero_shot, Layout.of(adapted).read(adapted)


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_a_job_prepared_block_by_block_is_that_of_the_whole_model(task: str, tmp_path: Path) -> None:
    config, lines = federation(tmp_path, task), list[str]()
    records = read_records(config, config.data.public)
    store = Store(tmp_path / "run")
    job = prepare(config, records=records, federation=PARTIES, store=store, on_step=lines.append)
    digest, cosine, zero_shot, start = by_hand(config, job, tmp_path / "package")
    assert job.manifest.emulator == digest
    assert job.emulator.cosine == cosine
    assert job.zero_shot.loss == zero_shot
    assert (job.start == start).all()
    assert any("are read from the files, block by block" in line for line in lines)


def test_the_needed_memory_is_the_model_one_wide_block_and_what_lies_around() -> None:
    blocks = [nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)) for _ in range(3)]
    model = nn.ModuleDict({"table": nn.Embedding(10, 8), "blocks": nn.ModuleList(blocks)}).to(torch.bfloat16)
    assert needed_bytes(model) == int(SPARE * (2 * (80 + 3 * 128) + 4 * (80 + 128)))
