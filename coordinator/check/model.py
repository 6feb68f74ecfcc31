"""The check of the full model and its processor, which reads no weight; every finding about a model comes from here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from offsite.coordinator.config.federation_file import FedConfig
from offsite.errors import DataError, lookup
from offsite.task import checkpoint
from offsite.task.findings import Findings
from offsite.task.nothing_to_learn import Encoder
from offsite.task.spec import Task
from offsite.task.tasks import TASKS

DIFFUSION = "diffusion"  # the kind of models that transformers does not load


def check_model(config: FedConfig, findings: Findings) -> Encoder | None:
    """Checks the model's folder, its configuration and its processor.

    Returns:
      The encoder of the job's records, or None where the model does not give one.
    """
    before = len(findings.errors)
    with findings.gathering():
        task = lookup(TASKS, config.model.task, "model.task")
        if task.kind != DIFFUSION:
            checkpoint.check(config.model.path, kind=task.kind)
        model_config = read_model_config(task, Path(config.model.path))
        processor = task.load_processor(config.model.path)
        for rule in RULES:
            for note in rule(task, Path(config.model.path), config.data.length, processor):
                findings.warn(note)
        if len(findings.errors) == before:
            return Encoder(task, processor, config.data.length, config.data.split, model_config)
    return None


def read_model_config(task: Task, folder: Path) -> Any:
    """Returns the configuration of a model's folder, without its weights.

    Raises:
      DataError: there is no readable configuration.
    """
    if task.kind != DIFFUSION:
        try:
            return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise DataError(
                f"model={str(folder)!r}: config.json cannot be read ({line}); save the model again"
            ) from None
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"model={str(folder)!r} has no readable config.json; save the model again") from error


# Rules that hold for task, model folder, length of examples and processor before a weight is loaded. Each returns its
# warnings, and raises an `OffsiteError`.
RULES: tuple[Callable[[Task, Path, int, Any], list[str]], ...] = ()
