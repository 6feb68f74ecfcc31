"""The coordinator's public records: read as the federation file says, and split into examples by purpose."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offsite.coordinator.config.federation_file import FedConfig
from offsite.coordinator.job.public_counts import CLIP_EXAMPLES, check_public
from offsite.errors import lookup
from offsite.task.nothing_to_learn import Encoder, Learnt, counted, learnt
from offsite.task.readers.columns import Columns, columns_of
from offsite.task.readers.tables import note_on, read
from offsite.task.selection import spread_rows
from offsite.task.spec import Batch, Record, Task
from offsite.task.tasks import TASKS

CALIBRATION_EXAMPLES = 64
GATE_EXAMPLES = 8


@dataclass(frozen=True)
class PublicRecords:
    """Public examples by purpose: even examples tune, odd examples test, so that no test example was tuned on.

    Attributes:
      calibration: examples that compressors are fitted to.
      tune: examples for the gate and the clip.
      test: examples for every score.
      learnt: number of records and of targets, and the reason of the first record without a target.
      tested: records of `test`; () where texts are cut into blocks, which are no records.
    """

    calibration: Batch
    tune: Batch
    test: Batch
    learnt: Learnt
    tested: tuple[Record, ...] = ()


def columns_in(config: FedConfig) -> Columns:
    """Returns the columns that a federation file names for its task.

    Raises:
      UnknownName: the task does not exist.
      ConfigError: the task has no such field.
    """
    fields = lookup(TASKS, config.model.task, "model.task").columns
    data = config.data
    return columns_of(fields, column=data.column, names=data.columns, labels=data.labels)


def read_records(config: FedConfig, path: str) -> list[Record]:
    """Returns the records of a file or folder, read as a federation file says; the check has told what is passed over.

    Raises:
      UnknownName: the task or the reader does not exist.
      ConfigError: the task has no such field.
      DataError: the records cannot be read.
    """
    return read(Path(path), reader=config.data.reader or None, columns=columns_in(config), on_note=lambda note: None)


def passed_over(config: FedConfig, path: str) -> str:
    """Returns one line about the files of a folder that are no records; empty where there is none."""
    return note_on(path, config.data.reader)


def public_records(
    config: FedConfig, task: Task, processor: Any, records: Sequence[Record], model_config: Any
) -> PublicRecords:
    """Returns the public examples: even examples tune, odd examples test.

    Args:
      config: the federation file.
      task: task of the job.
      processor: processor of the model, see `task.spec`.
      records: public records.
      model_config: configuration of the model.

    Raises:
      DataError: there are too few public records, or a record is wrong.
    """
    encoder = Encoder(task, processor, config.data.length, config.data.split, model_config)
    examples = encoder.encode(records)
    outcome = learnt(encoder, records, counted(examples))
    kept = torch.nonzero(examples.targets).reshape(-1)
    examples = examples.select(kept)  # examples without targets have no gradient
    check_public(config, len(examples), outcome)
    tune = spread_rows(np.arange(0, len(examples), 2), max(CLIP_EXAMPLES, GATE_EXAMPLES))
    others = np.setdiff1d(np.arange(0, len(examples), 2), tune)
    test = spread_rows(np.arange(1, len(examples), 2), config.evaluation.public_examples)
    return PublicRecords(
        # With no more records than the tests need, compressors are fitted to the same examples that the gate uses.
        calibration=examples.select(spread_rows(others if len(others) else tune, CALIBRATION_EXAMPLES)),
        tune=examples.select(tune),
        test=examples.select(test),
        learnt=outcome,
        tested=tuple(records[int(kept[row])] for row in test) if config.data.split == "truncate" else (),
    )
