"""The check of the full model against a federation file; no weight is loaded.

The model's class takes seconds to load. So the class is loaded where no fault is known yet, or where the model's files
leave something open; see `is_in_doubt`.
"""

from importlib.util import find_spec
from pathlib import Path

from offsite.coordinator.check.names import is_plain
from offsite.coordinator.config.federation_file import FedConfig
from offsite.emulator.structure.ends import SANDWICH
from offsite.task.device import AUTO, CPU
from offsite.task.findings import Findings
from offsite.task.model_check import ModelFiles, check_class
from offsite.task.nothing_to_learn import Encoder
from offsite.task.number_format import FLOAT16, check_dtype_on
from offsite.task.record_fields import FIELDS, LABELS
from offsite.task.stated_config import BLOCKS, POSITIONS, stated, stated_labels
from offsite.task.target_counts import TargetCounter

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


def counter_of(config: FedConfig, files: ModelFiles) -> TargetCounter | None:
    """Returns the counter of a job's targets, or None where only the model's class knows the labels' names."""
    task, labels = config.model.task, stated_labels(files.document)
    if labels is None and set(LABELS) & set(FIELDS[task]):
        return None
    return TargetCounter(task, files.tokenizer, config.data.length, config.data.split, labels)


def is_in_doubt(config: FedConfig, files: ModelFiles) -> bool:
    """Whether the model's class may find a fault that its files do not show; errs on the side of a doubt.

    Only where another fault is known already does the answer decide whether the class is loaded at once.
    """
    document, ends = files.document, config.emulator.first + config.emulator.last
    positions, blocks, name = stated(document, *POSITIONS), stated(document, *BLOCKS), document.get("model_type")
    classes, rows = document.get("architectures"), stated(document, "vocab_size") or 0
    ids = [stated(document, key) for key in ("pad_token_id", "decoder_start_token_id")]
    known = isinstance(classes, list) and len(classes) == 1 and str(classes[0]).endswith(_CLASSES[config.model.task])
    return not (
        known
        and isinstance(name, str)
        and _is_family(name)
        and FEWEST <= config.data.length <= (positions or 0) - SPARE
        and ends < (blocks or 0)
        and all(number is None or 0 <= number < rows for number in ids)
        and config.emulator.shape == SANDWICH
        and is_plain(config)
        and not config.adapter.targets
        and not config.evaluation.measures
        and config.compute.device in (AUTO, CPU)
        and config.compute.dtype != FLOAT16
    )


def _is_family(name: str) -> bool:
    """Whether transformers has a folder for a model type; found without an import."""
    package = find_spec("transformers")
    places = package.submodule_search_locations if package else None
    folder = name.replace("-", "_")
    return folder.isidentifier() and any((Path(place) / "models" / folder).is_dir() for place in places or ())


def check_model(config: FedConfig, length: int, files: ModelFiles | None, findings: Findings) -> Encoder | None:
    """Checks the model as transformers sees it; see `task.model_check.check_class`.

    Args:
      config: the federation file.
      length: number of tokens of an example.
      files: what the files say, with the tokenizer; None to read the processor here.
      findings: findings so far.

    Returns:
      The encoder of the job's records, or None where the model does not give one.
    """
    from offsite.coordinator.job.full_model import check_full_model_fits
    from offsite.task.device import choose_device
    from offsite.task.generation import GeneratingTask
    from offsite.task.model_fit import check_generation

    folder = Path(config.model.path)
    with findings.gathering():
        device = choose_device(config.compute.device)
        check_full_model_fits(config, device)
        check_dtype_on(config.compute.dtype, device)
    model = check_class(config.model.task, folder, length, files, findings)
    if model is None:
        return None
    if config.evaluation.measures and isinstance(model.task, GeneratingTask):
        with findings.gathering():
            for note in check_generation(model.task, folder, length, config.evaluation.new_tokens):
                findings.warn(note)
    return Encoder(model.task, model.processor, length, config.data.split, model.config)


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


def check_memory(config: FedConfig, encoder: Encoder, findings: Findings) -> None:
    """Compares what full model and emulator take with the memory of this machine; see `coordinator.check.memory`.

    Args:
      config: the federation file.
      encoder: encoder of the job.
      findings: findings so far.
    """
    from offsite.coordinator.check import memory
    from offsite.task.kinds import KINDS

    if encoder.task.kind in KINDS and not findings.errors:
        memory.check_memory(config, encoder.task, encoder.model_config, findings)
