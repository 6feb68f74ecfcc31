"""One record replaced changes one row of the encoded batch, in every task, from the data file on.

The file has odd records as well: blank, without a value, broken, with another type, and the longest or largest of all.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from offsite.errors import ConfigError
from offsite.privacy.batches import trainable
from offsite.privacy.mechanism import DpSgdConfig, DpTraining
from offsite.privacy.randomness import Randomness
from offsite.privacy.zero_order import Directions, train
from offsite.task.readers.columns import columns_of
from offsite.task.readers.tables import read_for_job
from offsite.task.records import without_empty
from offsite.task.tasks import TASKS
from tests.task_samples import Sample, first_of, write_records

CLIP = 1e-3
PLAIN = 2  # records at the ends of the file that break no rule


def tensors(batch: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor of a batch by the name of its field."""
    if isinstance(batch, torch.Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from tensors(value, f"{name}.{key}")
    elif dataclasses.is_dataclass(batch):
        for field in dataclasses.fields(batch):
            yield from tensors(getattr(batch, field.name), f"{name}.{field.name}")


def longest(value: Any) -> Any:
    """Returns a field's value many times as long."""
    if isinstance(value, str):
        return " ".join([value] * 300)
    if isinstance(value, np.ndarray):
        return np.concatenate([value] * 7) if value.ndim == 2 else value
    return value * 40 if isinstance(value, list) else value


def odd(sample: Sample) -> list[dict[str, Any]]:
    """Returns records that no honest site would send, as the sample's kind of file can hold them; the last is long."""
    record = sample.records(1, 7)[0]
    large = {field: longest(value) for field, value in record.items()}
    if sample.suffix == ".npz":  # all rows of an array have one type, so only values can be odd
        label = {"label": 10**6} if "label" in record else {"prompt_embeds": record["prompt_embeds"] * np.nan}
        return [record | {"latents": record["latents"] * np.nan}, record | label, large]
    if sample.suffix == ".parquet":
        image, second = np.full((90, 50, 3), 7, np.uint8), next(field for field in record if field != "image")
        large |= {"image": image, second: record[second]}
        return [record | {"image": b"no image"}, record | {second: None}, large]
    blank = {field: "" if isinstance(value, str) else [] if isinstance(value, list) else None
             for field, value in record.items()}  # fmt: skip
    return [blank, dict.fromkeys(record), record | {list(record)[-1]: {"of": "another type"}}, large]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_one_record_replaced_changes_one_row(name, tmp_path):
    sample, task = first_of(name), TASKS[name]
    folder = sample.save(tmp_path / "model")
    model = task.load(folder, dtype=torch.float32)
    next(p for p in model.parameters() if p.ndim == 1 and p.numel() >= 8).requires_grad_(True)
    processor, path = task.load_processor(folder), tmp_path / f"data{sample.suffix}"

    def encoded(rows: list[dict[str, Any]]) -> Any:
        write_records(rows, path)
        records = read_for_job(path, reader=sample.reader or None, columns=columns_of(task.columns, names={}))
        terms = {"length": sample.length, "split": "truncate", "model_config": model.config}
        return without_empty(task.encode(processor, records, **terms), records, "truncate")

    first, last, other = sample.records(3, 1)
    rows = [first, *odd(sample), last]
    batch = encoded(rows)
    assert len(batch) == len(rows)
    assert (batch.targets[1 : len(rows) - PLAIN] == 0).all()  # all odd records but the long one
    assert (batch.targets[[0, len(rows) - 1]] > 0).all()
    for index in range(1, len(rows) - 1):
        found = dict(tensors(encoded([*rows[:index], other, *rows[index + 1 :]])))
        others = [row for row in range(len(rows)) if row != index]
        for field, tensor in tensors(batch):
            alike = tensor, found[field]
            if field != ".prompts":  # the prompts of the classes are public, and no row is a record
                alike = tensor[others], found[field][others]
            assert torch.equal(*alike), field
    without_longest = encoded([*rows[:-2], rows[1], last])
    slopes = [slope_sum(task, model, examples.within(model)) for examples in (batch, without_longest)]
    assert abs(slopes[0] - slopes[1]) <= CLIP * (1 + 1e-6)


def slope_sum(task: Any, model: Any, batch: Any) -> float:
    """Returns the sum of clipped slopes of one step of DP-ZO over all records, without noise; the model stays."""
    before = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    terms = DpSgdConfig(1.0, CLIP, sample_rate=1.0, expected_batch_size=1, steps=1, learning_rate=1.0)
    training = DpTraining(model, task.losses, batch, terms, NoNoise(bytes(32), seeded=True))
    moved = float(train(training, smallest_spacing())[1][0])
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(before[name])
    return moved


class NoNoise(Randomness):
    """All records, and zeros for noise; exists in tests only."""

    def normal(self, n: int) -> np.ndarray:
        return np.zeros(n)


def smallest_spacing() -> Directions:
    """Returns one direction with the smallest power of ten that is allowed: rounding counts most there."""
    for exponent in range(-12, 0):
        with contextlib.suppress(ConfigError):
            return Directions(bytes(32), 1, 10.0**exponent)
    raise AssertionError("no spacing is allowed")
