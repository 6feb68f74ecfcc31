"""The check of memory: whether full model and emulator fit this machine, by the numbers of `offsite plan`."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from offsite.coordinator.config.emulator_table import EmulatorConfig
from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.plan.coordinator_phases import least_memory
from offsite.coordinator.plan.make_plan import Planner
from offsite.coordinator.plan.model_outline import Outline, outline_of
from offsite.coordinator.plan.paper_package import Design, PaperPackage, make_package
from offsite.coordinator.plan.request import PlanRequest
from offsite.coordinator.plan.trial import Batches
from offsite.coordinator.report.formatting import size
from offsite.errors import OffsiteError
from offsite.task.checkpoint import stored_dtype
from offsite.task.device import choose_device
from offsite.task.device_memory import whole_memory
from offsite.task.findings import Findings
from offsite.task.kinds import KINDS

NEAR = 3  # a job of a third of the memory is not looked at more closely: weights are most of a peak


def check_memory(
    config: FedConfig, task: Any, model_config: Any, findings: Findings, memory: int | None = None
) -> None:
    """Compares what the coordinator needs with the memory of the device on which it computes.

    A job whose weights alone do not fit is a fault. A job whose estimated peak does not fit is a warning, since an
    estimate may be off by some percent.

    Args:
      config: the federation file.
      task: task of the job.
      model_config: configuration of the model.
      findings: findings so far; other checks add the faults of blocks, recipe and adapter.
      memory: bytes of the device; None asks the device.
    """
    with suppress(OffsiteError):
        device = choose_device(config.compute.device)
        limit = whole_memory(device) if memory is None else memory
        with torch.device("meta"):
            model = KINDS[task.kind].from_config(model_config)
        folder = Path(config.model.path)
        outline = outline_of(model, task, stored_dtype(folder), folder.name)
        package = max((make_package(outline, design) for design in _designs(config.emulator)), key=_widened)
        least, where = least_memory(package), f"device={device}: {size(limit)} of memory"
        remedy = f"see offsite plan {config.model.path}; take a larger machine, or a smaller model"
        if least > limit:
            findings.add(f"{where}, and the weights of full model and emulator alone take {size(least)}; {remedy}")
        elif NEAR * least > limit:
            peak, phase = _peak(config, outline, package)
            if peak > limit:
                findings.warn(f"{where}, and the phase {phase} is estimated to take {size(peak)}; {remedy}")


def _designs(emulator: EmulatorConfig) -> list[Design]:
    """Returns the emulators of a job: the default, and the variants."""
    kinds = [(emulator.compress, emulator.embedding)]
    kinds += [(own.compress or emulator.compress, own.embedding or emulator.embedding) for own in emulator.variants]
    return [Design(emulator.first, emulator.last, emulator.shape, recipe, tables) for recipe, tables in kinds]


def _widened(package: PaperPackage) -> int:
    return package.widened


def _peak(config: FedConfig, outline: Outline, package: PaperPackage) -> tuple[int, str]:
    """Returns the estimated peak of the coordinator, imports included, and its phase."""
    training = config.training
    request = PlanRequest(
        adapter=config.adapter.spec(slots=(), seed=config.seed),
        batches=Batches(config.data.length, training.physical_batch),
        batch=training.batch,
        scored=config.evaluation.public_examples,
    )
    planner = Planner(outline, request)
    coordinator = planner.coordinator(planner.site(package.design, quick=True))
    most = max(coordinator.phases(None), key=lambda phase: phase.memory)
    return planner.imports + most.memory, most.name
