"""The check of the full model and its processor, which reads no weight; every finding about a model comes from here."""

import json
from pathlib import Path
from typing import Any

from offsite.coordinator.config.federation_file import FedConfig
from offsite.errors import DataError, lookup
from offsite.task.findings import Findings
from offsite.task.kinds import KINDS
from offsite.task.model_fit import check_fit
from offsite.task.model_folder import read_config
from offsite.task.nothing_to_learn import Encoder
from offsite.task.spec import Task
from offsite.task.tasks import TASKS
from offsite.task.tokenizer_agreement import check_agreement


def check_model(config: FedConfig, length: int, findings: Findings) -> Encoder | None:
    """Checks the model's folder, its configuration and its processor.

    Args:
      config: the federation file.
      length: number of tokens of an example.
      findings: findings so far.

    Returns:
      The encoder of the job's records, or None where the model does not give one.
    """
    before, folder = len(findings.errors), Path(config.model.path)
    model_config = processor = task = None
    with findings.gathering():
        task = lookup(TASKS, config.model.task, "model.task")
    if task is None:
        return None
    with findings.gathering():
        model_config = read_model_config(task, folder)
    with findings.gathering():
        processor = task.load_processor(folder)
    if len(findings.errors) > before:
        return None
    with findings.gathering():
        for note in check_fit(task, folder, length, processor):
            findings.warn(note)
    with findings.gathering():
        for note in check_agreement(folder, processor):
            findings.warn(note)
    if len(findings.errors) > before:
        return None
    return Encoder(task, processor, length, config.data.split, model_config)


def read_model_config(task: Task, folder: Path) -> Any:
    """Returns the configuration of a model's folder, without its weights.

    Raises:
      DataError: there is no readable configuration.
      UnsupportedModel: transformers knows no such model of the task's kind.
    """
    if task.kind in KINDS:
        return read_config(folder, task.kind)
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"model={str(folder)!r} has no readable config.json; save the model again") from error
