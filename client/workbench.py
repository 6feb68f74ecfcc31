"""The emulator with its adapter, opened from a verified package, ready to train on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapter.layout import Layout
from adapter.methods import attach
from emulator import package
from errors import DigestMismatch, lookup
from protos.manifest import JobManifest
from task.spec import Task
from task.tasks import TASKS


@dataclass
class Workbench:
    """One loaded emulator; sites of one machine may share it, since each writes its adapter before it trains.

    Attributes:
      model: the emulator with the adapter attached; only the adapter requires gradients.
      task: gives per-example losses.
      layout: order of the adapter's parameters.
      tokenizer: of the package.
      engine: per-example gradient engine that passed the probe; empty until a site has probed.
    """

    model: Any
    task: Task
    layout: Layout
    tokenizer: Any
    engine: str = ""


def open_workbench(folder: Path, manifest: JobManifest) -> Workbench:
    """Loads the emulator package that the manifest names.

    Raises:
      DigestMismatch: the package, or the adapter that the manifest's recipe gives on it, is another one.
    """
    task = lookup(TASKS, manifest.task, "task")
    model = package.load(folder, dtype=torch.float32, expected_digest=manifest.emulator)
    model = attach(model, manifest.adapter)
    layout = Layout.of(model)
    if layout.digest() != manifest.layout.digest():
        raise DigestMismatch(
            f"layout={layout.digest().hex()[:12]}: the adapter on this emulator is not the one of the job manifest; "
            "install the same release on both sides"
        )
    return Workbench(model, task, layout, task.load_tokenizer(folder))
