"""A job of a quantised full model is the job of the dense model with the widened weights, and its report says so."""

from pathlib import Path

import pytest
import torch

from offsite.coordinator.config.federation_file import read_config
from offsite.coordinator.job.prepare import Job
from offsite.coordinator.report.facts import warnings_of
from offsite.coordinator.report.quality_facts import FourScores, Quality
from offsite.emulator.package import package_reader
from offsite.emulator.package.storage import is_verbatim
from offsite.simulation.check import check_simulation
from offsite.simulation.run_folder import Run
from offsite.task.findings import Findings
from tests.task.packers import coded, gptq, shuffled, write

SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}
SENTENCE = "the model is scored with its 4-bit weights widened to float16 (gptq); the weights before"


@pytest.fixture(scope="module")
def folders(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a federation by the kind of its model, dense or packed."""
    folder = tmp_path_factory.mktemp("packed")

    def layer(weight: torch.Tensor):  # type: ignore[no-untyped-def]
        own = coded(weight, 4, shuffled(weight.shape[1]))
        return own.dense, gptq(own, 4, less=1, with_index=True)

    models = dict(zip(("dense", "packed"), write(fed.parent / "model", folder, SETTINGS, layer), strict=True))
    for name, model in models.items():
        (model.parent / f"of_{name}").mkdir()
        (model.parent / f"of_{name}" / "model").symlink_to(model)
        (model.parent / f"of_{name}" / "data").symlink_to(fed.parent / "data")
        (model.parent / f"of_{name}" / "fed.toml").write_text(fed.read_text())
    return {name: model.parent / f"of_{name}" for name, model in models.items()}


def opened(folder: Path) -> tuple[Run, Job]:
    config, sha256 = read_config(folder / "fed.toml")
    run = Run.create(config, sha256, folder / "run")
    return run, run.open_job()


def warnings(run: Run, job: Job) -> tuple[str, ...]:
    scores = FourScores(job.zero_shot, job.emulator.public, job.emulator.public, job.zero_shot)
    return warnings_of(run.config, job, (), Quality(scores), ())


def test_a_packed_model_gives_the_job_of_its_widened_weights(folders: dict[str, Path]) -> None:
    findings = Findings()
    check_simulation(read_config(folders["packed"] / "fed.toml")[0], folders["packed"] / "run", findings)
    assert not findings.errors
    assert any(SENTENCE in line for line in findings.warnings), findings.warnings
    (run, packed), (plain_run, dense) = opened(folders["packed"]), opened(folders["dense"])
    assert packed.emulators == dense.emulators  # the same package to the last byte, gate and scores
    assert packed.zero_shot == dense.zero_shot
    assert packed.manifest.privacy == dense.manifest.privacy
    assert packed.manifest.base != dense.manifest.base
    assert any(line.startswith(SENTENCE) for line in warnings(run, packed))
    assert not any("widened" in line for line in warnings(plain_run, dense))
    facts = packed.emulator.facts
    slots = {how for name, how in facts.storage.items() if name.startswith("model.layers.0.")}
    assert slots == {"fp16"}
    assert is_verbatim("fp16")
    assert package_reader.load(run.store.package).dtype == torch.float16
    again = run.open_job()  # opened, and not built
    assert again.emulators == packed.emulators
    assert all(torch.equal(a, b) for a, b in zip(again.full.parameters(), packed.full.parameters(), strict=True))
