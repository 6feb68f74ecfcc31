"""The check of a site's own data: one pass over the file, and the same findings as a pass for each task."""

import json
from pathlib import Path

import pytest

from offsite.client.home.data_check import OwnData, check_own_data
from offsite.errors import DataError
from offsite.task.readers.columns import columns_for
from offsite.task.readers.tables import read
from offsite.task.record_fields import FIELDS


def checked(path: Path) -> OwnData:
    return check_own_data(path, reader="", column="", names={}, labels={})


def tasks_of(path: Path) -> list[str]:
    """The tasks that can read all of a file, one pass for each task."""
    fitting = []
    for task in FIELDS:
        try:
            read(path, reader=None, columns=columns_for(task, column="", names={}))
        except DataError:
            continue
        fitting.append(task)
    return fitting


def read_bytes() -> int:
    """The bytes that this process has read so far, from the kernel's account."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


ROWS: dict[str, dict[str, object]] = {
    "text and label": {"text": "some words", "label": "ham"},
    "two pairs": {"prompt": "a", "completion": "b", "source": "a", "target": "b"},
    "all": {
        "text": "a", "label": "b", "words": ["a"], "labels": ["x"], "messages": [{"role": "user", "content": "a"}],
        "question": "a", "context": "b", "answer": "b", "answer_start": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_the_tasks_are_those_of_a_pass_for_each(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text((json.dumps(ROWS[kind]) + "\n") * 5)
    data = checked(path)
    assert list(data.records) == tasks_of(path) != []
    for task, records in data.records.items():
        own = read(path, reader=None, columns=columns_for(task, column="", names={}))
        assert [{field: record[field] for field in FIELDS[task]} for record in records] == [dict(one) for one in own]


def test_a_label_that_lacks_in_one_row_leaves_the_texts(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n' * 3 + '{"text": "a"}\n')
    assert list(checked(path).records) == tasks_of(path) == ["causal_lm"]


def test_faults_of_later_rows_are_told_of_the_task_that_the_file_is_for(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    path.write_text('{"prompt": "a"}\n' + good * 3 + "{broken\n" + good)
    data = checked(path)
    assert not data.records
    assert [[word in fault for word in ("line=1", "line=5")] for fault in data.faults] == [[True, False], [False, True]]


def test_a_large_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,label\n" + f"{'some words of a record ' * 100},ham\n" * 20_000)
    before = read_bytes()
    assert list(checked(path).records) == ["causal_lm", "sequence_classification"]
    assert read_bytes() - before < 1.6 * path.stat().st_size
