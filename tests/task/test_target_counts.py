"""The targets that a check counts in rows of tokens are those that the tasks' own examples have."""

from pathlib import Path

import pytest

from offsite.task.model_folder import read_config
from offsite.task.nothing_to_learn import Encoder
from offsite.task.records import LenientRecords, Row
from offsite.task.target_counts import COUNTS, TargetCounter
from offsite.task.tasks import TASKS
from tests.task_samples import first_of


@pytest.mark.parametrize("task", COUNTS)
@pytest.mark.parametrize("length", [12, 16])
def test_counts_are_the_targets_of_the_examples(task: str, length: int, tmp_path: Path) -> None:
    sample = first_of(task)
    sample.save(tmp_path)
    config, processor = read_config(tmp_path, TASKS[task].kind), TASKS[task].load_processor(tmp_path)
    records = LenientRecords(sample.records(9, 3))
    records[4] = Row(records[4], "line=5", empty=True)
    for split in ("truncate", "blocks") if task == "causal_lm" else ("truncate",):
        encoded = Encoder(TASKS[task], processor, length, split, config).encode(records)
        counted = TargetCounter(task, processor, length, split, config).targets(records)
        assert counted == encoded.targets.tolist()
        assert any(counted)
