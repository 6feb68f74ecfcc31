"""task.readers.class_names: numbers mean what the file's own metadata say, in any order of the names."""

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from offsite.errors import DataError
from offsite.task.label_names import LabelName
from offsite.task.readers.class_names import class_names
from offsite.task.readers.columns import columns_of
from offsite.task.readers.tables import read, read_for_job
from offsite.task.records import is_empty
from offsite.task.tasks import TASKS
from tests.task_samples import first_of

LABEL = {"names": ["pos", "neg"], "_type": "ClassLabel"}
VALUE = {"dtype": "string", "_type": "Value"}


def written(path, features, table):
    """Writes a Parquet file with metadata of `datasets`, in the form of its `Features.arrow_schema`."""
    schema = {"huggingface": json.dumps({"info": {"features": features}})} if features else {}
    pyarrow.parquet.write_table(pyarrow.table(table).replace_schema_metadata(schema), path)
    return path


def columns(task, **more):
    return columns_of(TASKS[task].columns, names={}, **more)


@pytest.mark.parametrize(
    "feature",
    [
        {"feature": LABEL, "_type": "List"},
        {"feature": LABEL, "length": -1, "_type": "Sequence"},
        {"feature": LABEL, "_type": "LargeList"},
        [LABEL],
    ],
)
def test_names_are_found_in_lists_however_they_were_written(tmp_path, feature):
    path = written(
        tmp_path / "d.parquet", {"words": VALUE, "labels": feature}, {"words": [["a", "b"]], "labels": [[1, 0]]}
    )
    assert read(path, reader=None, columns=columns("token_classification"))[0]["labels"] == ["neg", "pos"]


def test_names_are_found_in_nested_columns_and_other_types_have_none(tmp_path):
    features = {
        "outer": {"label": LABEL, "text": VALUE},
        "text": VALUE,
        "n": {"num_classes": 2, **LABEL},
        "image": {"_type": "Image"},
    }
    held = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    assert class_names(tmp_path, held) == {"outer.label": ["pos", "neg"], "n": ["pos", "neg"]}
    for empty in (None, {}, {b"huggingface": b"{}"}, {b"huggingface": b'{"info": {}}'}, {b"pandas": b"x"}):
        assert class_names(tmp_path, empty) == {}
    numbers = {"label": {"names": ["0", "1"], "_type": "ClassLabel"}}  # as `ClassLabel(num_classes=2)` names them
    assert class_names(tmp_path, {b"huggingface": json.dumps({"info": {"features": numbers}}).encode()}) == {}
    with pytest.raises(DataError, match="damaged metadata"):
        class_names(tmp_path, {b"huggingface": b"{"})


def test_a_number_without_a_name_and_a_missing_label_are_broken_rows(tmp_path):
    table = {"text": ["a", "b", "c", "d"], "label": [0, 2, -1, None]}
    path = written(tmp_path / "d.parquet", {"label": LABEL}, table)
    found = read_for_job(path, reader=None, columns=columns("sequence_classification"))
    assert [is_empty(record) for record in found] == [False, True, True, True]
    assert [fault.split(" column")[0].split()[-1] for fault in found.faults] == ["row=2", "row=3", "row=4"]
    with pytest.raises(DataError, match="row=2 column='label'"):
        read(path, reader=None, columns=columns("sequence_classification"))


def test_spark_names_the_numbers_of_its_string_indexer(tmp_path):
    fields = [
        {"name": "text", "metadata": {}},
        {"name": "label", "metadata": {"ml_attr": {"vals": ["pos", "neg"], "type": "nominal"}}},
    ]
    path, key = tmp_path / "d.parquet", "org.apache.spark.sql.parquet.row.metadata"
    table = pyarrow.table({"text": ["a", "b"], "label": [1.0, 0.0]})
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({key: json.dumps({"type": "struct", "fields": fields})}), path
    )
    found = read(path, reader=None, columns=columns("sequence_classification"))
    assert [record["label"] for record in found] == ["neg", "pos"]


def test_the_table_of_labels_reads_the_names_of_the_file(tmp_path):
    path = written(tmp_path / "d.parquet", {"label": LABEL}, {"text": ["a", "b"], "label": [0, 1]})
    found = read(path, reader=None, columns=columns("sequence_classification", labels={"pos": "spam", "neg": "ham"}))
    assert [record["label"] for record in found] == ["spam", "ham"]
    assert all(isinstance(record["label"], LabelName) for record in found)


def png():
    content = io.BytesIO()
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    def open_task(name):
        sample, task = first_of(name), TASKS[name]
        folder = sample.save(tmp_path_factory.mktemp(name))
        return sample, task, task.load(folder, dtype=torch.float32).config, task.load_processor(folder)

    return open_task


def encoded(opened, path, reader, **more):
    sample, task, config, processor = opened
    records = read(path, reader=reader, columns=columns(task.name, **more))
    return task.encode(processor, records, length=sample.length, split="truncate", model_config=config)


@pytest.mark.parametrize(
    "name", ["sequence_classification", "token_classification", "image_classification", "clip_classification"]
)
def test_the_same_labels_are_learnt_whether_a_site_holds_names_or_numbers_of_its_own_order(name, opened, tmp_path):
    task = opened(name)
    names = [task[2].id2label[number] for number in range(len(task[2].id2label))]
    order = names[::-1]
    if name == "token_classification":
        table, field = {"words": [["w1"] * len(names)] * 2}, "labels"
        by_name, feature = [names, order], {"feature": {"names": order, "_type": "ClassLabel"}, "_type": "List"}
        by_number = [[order.index(label) for label in own] for own in by_name]
    else:
        field, by_name, feature = "label", names, {"names": order, "_type": "ClassLabel"}
        by_number = [order.index(label) for label in names]
        table = (
            {"text": ["w1 w2"] * len(names)} if name == "sequence_classification" else {"image": [png()] * len(names)}
        )
    reader = "image_parquet" if "image" in table else None
    plain = encoded(task, written(tmp_path / "a.parquet", {}, {**table, field: by_name}), reader)
    numbered = encoded(task, written(tmp_path / "b.parquet", {field: feature}, {**table, field: by_number}), reader)

    def learnt(batch):
        return getattr(batch, "images", batch).labels

    assert torch.equal(learnt(numbered), learnt(plain))
    other = [f"other {label}" for label in order]
    changed = json.loads(json.dumps(feature).replace('"names": [', f'"names": {json.dumps(other)}, "before": ['))
    with pytest.raises(DataError, match=rf"row=1 field='{field}': must be one of the model's {len(names)} labels"):
        encoded(task, written(tmp_path / "c.parquet", {field: changed}, {**table, field: by_number}), reader)
