"""The check of the full model, first by its files alone, then by its class; no weight is loaded.

The files alone need no model library, so that a fault in a data file is told in a second. The model's class is loaded
where no fault is known yet, or where its files leave something open; see `is_in_doubt`.
"""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from offsite.coordinator.check.names import is_plain
from offsite.coordinator.config.federation_file import FedConfig
from offsite.emulator.structure.ends import SANDWICH
from offsite.errors import DataError, lookup
from offsite.task import model_folder
from offsite.task.findings import Findings
from offsite.task.nothing_to_learn import Encoder
from offsite.task.record_fields import FIELDS, LABELS
from offsite.task.spec import Task
from offsite.task.stated_config import BLOCKS, POSITIONS, check_rows, stated, stated_labels
from offsite.task.target_counts import COUNTS, TargetCounter
from offsite.task.tokenizer import Tokenizer

SPARE = 16  # positions; no family has so many rows of its table that are no positions
FEWEST = 8  # tokens; some tasks need a few more than the federation file asks for
# Ends of the names of the classes that load a model for a task.
_CLASSES = {
    "causal_lm": ("ForCausalLM", "LMHeadModel"),
    "prompt_completion": ("ForCausalLM", "LMHeadModel"),
    "chat": ("ForCausalLM", "LMHeadModel"),
    "sequence_classification": ("ForSequenceClassification",),
    "token_classification": ("ForTokenClassification",),
    "seq2seq": ("ForConditionalGeneration", "MTModel"),
}


@dataclass(frozen=True)
class ModelFiles:
    """What the files of a model's folder say.

    Attributes:
      document: content of config.json.
      tokenizer: the tokenizer.
    """

    document: dict[str, Any]
    tokenizer: Tokenizer

    def counter(self, config: FedConfig) -> TargetCounter | None:
        """Returns the counter of a job's targets, or None where only the model's class knows the labels' names."""
        task, labels = config.model.task, stated_labels(self.document)
        if labels is None and set(LABELS) & set(FIELDS[task]):
            return None
        return TargetCounter(task, self.tokenizer, config.data.length, config.data.split, labels)


def check_files(config: FedConfig, findings: Findings) -> ModelFiles | None:
    """Checks the files of a text task's model: configuration, weights and tokenizer.

    Args:
      config: the federation file.
      findings: findings so far.

    Returns:
      What the files say, or None where a file is at fault, or the task is not of texts alone.
    """
    before, folder = len(findings.errors), Path(config.model.path)
    document, tokenizer = dict[str, Any](), None
    with findings.gathering():
        lookup(FIELDS, config.model.task, "model.task")
    if config.model.task not in COUNTS:
        return None
    with findings.gathering():
        document = model_folder.document(folder)
        with findings.gathering():
            model_folder.check_plain(folder, document)
        with findings.gathering():
            model_folder.check_weights(folder)
        tokenizer = Tokenizer.of(folder)
    if tokenizer is None or len(findings.errors) > before:
        return None
    with findings.gathering():
        rows = stated(document, "vocab_size")
        check_rows(tokenizer.largest_id, tokenizer.largest_id + 1 if rows is None else rows)
    return ModelFiles(document, tokenizer) if len(findings.errors) == before else None


def is_in_doubt(config: FedConfig, files: ModelFiles) -> bool:
    """Whether the model's class may find a fault that its files do not show; errs on the side of a doubt.

    Only where another fault is known already does the answer decide whether the class is loaded at once.
    """
    document, ends = files.document, config.emulator.first + config.emulator.last
    positions, blocks, name = stated(document, *POSITIONS), stated(document, *BLOCKS), document.get("model_type")
    classes = document.get("architectures")
    known = isinstance(classes, list) and len(classes) == 1 and str(classes[0]).endswith(_CLASSES[config.model.task])
    return not (
        known
        and isinstance(name, str)
        and _is_family(name)
        and FEWEST <= config.data.length <= (positions or 0) - SPARE
        and ends < (blocks or 0)
        and config.emulator.shape == SANDWICH
        and is_plain(config)
        and not config.adapter.targets
        and not config.evaluation.measures
    )


def _is_family(name: str) -> bool:
    """Whether transformers has a folder for a model type; found without an import."""
    package = find_spec("transformers")
    places = package.submodule_search_locations if package else None
    folder = name.replace("-", "_")
    return folder.isidentifier() and any((Path(place) / "models" / folder).is_dir() for place in places or ())


def check_model(config: FedConfig, length: int, files: ModelFiles | None, findings: Findings) -> Encoder | None:
    """Checks the model's folder, its configuration and its processor as the model's class sees them.

    Args:
      config: the federation file.
      length: number of tokens of an example.
      files: what the files say, with the tokenizer; None to read the processor here.
      findings: findings so far.

    Returns:
      The encoder of the job's records, or None where the model does not give one.
    """
    from offsite.task.device import choose_device
    from offsite.task.generation import GeneratingTask
    from offsite.task.model_fit import check_fit, check_generation
    from offsite.task.tasks import TASKS
    from offsite.task.tokenizer_agreement import check_agreement

    before, folder = len(findings.errors), Path(config.model.path)
    model_config = processor = task = None
    with findings.gathering():
        choose_device(config.compute.device)
    with findings.gathering():
        task = lookup(TASKS, config.model.task, "model.task")
    if task is None:
        return None
    with findings.gathering():
        model_config = read_model_config(task, folder)
    with findings.gathering():
        processor = task.load_processor(folder) if files is None else files.tokenizer
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
    if config.evaluation.measures and isinstance(task, GeneratingTask):
        with findings.gathering():
            for note in check_generation(task, folder, length, config.evaluation.new_tokens):
                findings.warn(note)
    return Encoder(task, processor, length, config.data.split, model_config)


def check_structure(config: FedConfig, encoder: Encoder, findings: Findings) -> None:
    """Checks blocks, adapter and recipe against the structure of a model of transformers.

    Args:
      config: the federation file.
      encoder: encoder of the job.
      findings: findings so far.
    """
    from offsite.coordinator.check import structure
    from offsite.task.kinds import KINDS

    if encoder.task.kind in KINDS:
        structure.check_structure(config, encoder.task.kind, encoder.model_config, findings)


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
