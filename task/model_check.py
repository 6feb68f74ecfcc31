"""The check of a model's folder, first by its files alone, then as transformers sees it; no weight is loaded.

The coordinator's check before a run and the build of an emulator make this one check. The files alone need no model
library, so that their faults are told in a second.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.errors import DataError, lookup
from offsite.task import model_folder
from offsite.task.findings import Findings
from offsite.task.packed_format import packed_format
from offsite.task.record_fields import FIELDS
from offsite.task.spec import Task
from offsite.task.stated_config import check_rows, stated
from offsite.task.target_counts import COUNTS
from offsite.task.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelFiles:
    """What the files of a text model's folder say.

    Attributes:
      document: content of config.json.
      tokenizer: the tokenizer.
    """

    document: dict[str, Any]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class ModelClass:
    """A model as transformers sees it, without its weights.

    Attributes:
      task: task of the model.
      processor: processor of the folder, from the task.
      config: configuration of the model.
    """

    task: Task
    processor: Any
    config: Any


def check_files(task: str, folder: Path, findings: Findings) -> ModelFiles | None:
    """Checks the files of a text task's model: configuration, weights and tokenizer.

    Args:
      task: key of `task.tasks.TASKS`.
      folder: the model's folder.
      findings: findings so far.

    Returns:
      What the files say, or None where a file is at fault, or the task is not of texts alone.
    """
    before, document, tokenizer = len(findings.errors), dict[str, Any](), None
    with findings.gathering():
        lookup(FIELDS, task, "model.task")
    if task not in COUNTS:
        return None
    with findings.gathering():
        document = model_folder.document(folder)
        with findings.gathering():
            packed_format(folder, document)
        with findings.gathering():
            model_folder.check_weights(folder)
        tokenizer = Tokenizer.of(folder)
        rows = stated(document, "vocab_size")
        if rows is not None:
            check_rows(tokenizer.largest_id, rows)
    return ModelFiles(document, tokenizer) if tokenizer is not None and len(findings.errors) == before else None


def check_class(
    name: str, folder: Path, length: int, files: ModelFiles | None, findings: Findings
) -> ModelClass | None:
    """Checks a model's folder, its configuration and its processor with the libraries that load the model.

    Args:
      name: key of `task.tasks.TASKS`.
      folder: the model's folder.
      length: number of tokens of an example.
      files: what the files say, with the tokenizer; None to read the processor here.
      findings: findings so far; a warning is no fault.

    Returns:
      The model as transformers sees it, or None where something is at fault.
    """
    from offsite.task.model_fit import check_fit
    from offsite.task.tasks import TASKS
    from offsite.task.tokenizer_agreement import check_agreement

    before, config, processor = len(findings.errors), None, None
    if name not in TASKS:
        return None  # a finding of `check_files`
    task = TASKS[name]
    with findings.gathering():
        config = read_model_config(task, folder)
    with findings.gathering():
        processor = task.load_processor(folder) if files is None else files.tokenizer
    for check in (lambda: check_fit(task, folder, length, processor), lambda: check_agreement(folder, processor)):
        if processor is not None and config is not None:
            with findings.gathering():
                for note in check():
                    findings.warn(note)
    return ModelClass(task, processor, config) if len(findings.errors) == before else None


def read_model_config(task: Task, folder: Path) -> Any:
    """Returns the configuration of a model's folder, without its weights.

    Raises:
      DataError: there is no readable configuration.
      UnsupportedModel: transformers knows no such model of the task's kind.
    """
    from offsite.task.kinds import KINDS

    if task.kind in KINDS:
        return model_folder.read_config(folder, task.kind)
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"model={str(folder)!r} has no readable config.json; save the model again") from error
