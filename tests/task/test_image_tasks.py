"""The promises of all tasks with images, each with a tiny model."""

import dataclasses

import numpy as np
import pytest
import torch

from offsite.errors import ConfigError, DataError
from offsite.privacy.engines import ENGINES
from offsite.privacy.probe import probe
from offsite.task.records import LenientRecords
from tests.task.pictures import LENGTH, NAMES, TASKS, adapted, pictures

each = pytest.mark.parametrize("name", sorted(TASKS))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Returns a function from a task's name to the task, a new model and its processor."""
    folders = {}

    def load(name, dtype=torch.float32):
        task, write, targets, tower = TASKS[name]
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            write(folders[name])
        model = task.load(folders[name], dtype=dtype)
        return task, model, task.load_processor(folders[name]), targets, tower

    return load


def encoded(task, model, processor, records):
    return task.encode(processor, records, length=LENGTH, split="truncate", model_config=model.config)


def without_target(task, model, processor):
    """Returns three records; the second has no target."""
    batch = encoded(task, model, processor, pictures(3, 0))
    if task.name == "image_text":
        records = pictures(3, 0)
        records[1] = {**records[1], "question": "which pattern ? " * LENGTH}
        return encoded(task, model, processor, records)
    images = batch if task.name == "image_classification" else batch.images
    changed = dataclasses.replace(images, labels=images.labels.index_fill(0, torch.tensor([1]), len(NAMES)))
    batch = changed if task.name == "image_classification" else dataclasses.replace(batch, images=changed)
    return batch.within(model)


def gradient(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True, retain_graph=True)
    return torch.cat([one.flatten() for one in found])


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_one_finite_float32_number_per_example(name, opened, dtype):
    task, model, processor, *_ = opened(name, dtype)
    losses = task.losses(model, encoded(task, model, processor, pictures(3, 0)))
    assert losses.shape == (3,)
    assert losses.dtype == torch.float32
    assert torch.isfinite(losses).all()
    assert (losses > 0).all()
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@each
def test_no_example_touches_another(name, opened):
    task, model, processor, *_ = opened(name)
    batch = encoded(task, model, processor, pictures(3, 0))
    together = task.losses(model, batch)
    alone = torch.cat([task.losses(model, batch.select([row])) for row in range(3)])
    assert torch.allclose(together, alone, rtol=1e-5)
    assert torch.allclose(task.losses(model, batch.select([2, 0, 1])), together[[2, 0, 1]], rtol=1e-5)
    encoded_alone = encoded(task, model, processor, pictures(3, 0)[1:2])
    assert torch.allclose(task.losses(model, encoded_alone), together[1:2], rtol=1e-5)


@each
def test_the_gradient_of_one_loss_is_the_gradient_of_that_example_alone(name, opened):
    task, model, processor, *_ = opened(name)
    model.requires_grad_(True)
    batch = encoded(task, model, processor, pictures(3, 0))
    together = task.losses(model, batch)
    for row in range(3):
        alone = gradient(model, task.losses(model, batch.select([row]))[0])
        assert (gradient(model, together[row]) - alone).norm() < 1e-5 * alone.norm()


@each
def test_an_example_without_a_target_has_no_loss_and_no_gradient_and_the_others_keep_theirs(name, opened):
    task, model, processor, *_ = opened(name)
    model.requires_grad_(True)
    batch = without_target(task, model, processor)
    assert batch.targets[1] == 0
    losses = task.losses(model, batch)
    assert losses[1] == 0
    assert not gradient(model, losses[1]).any()
    whole = task.losses(model, encoded(task, model, processor, pictures(3, 0)))
    assert torch.allclose(losses[[0, 2]], whole[[0, 2]], rtol=1e-5)
    assert task.losses(model, batch.select([1])).tolist() == [0.0]


@each
def test_within_leaves_honest_examples_alone(name, opened):
    task, model, processor, *_ = opened(name)
    batch = encoded(task, model, processor, pictures(3, 0))
    assert torch.equal(task.losses(model, batch.within(model)), task.losses(model, batch))


@each
def test_tallies_add_up(name, opened):
    task, model, processor, *_ = opened(name)
    batch = encoded(task, model, processor, pictures(5, 0))
    whole = task.tally(model, batch)
    parts = [task.tally(model, batch.select(rows)) for rows in ([0, 1], [2], [3, 4])]
    total = parts[0] + parts[1] + parts[2]
    assert whole.targets == total.targets == int(batch.targets.sum())
    assert whole.loss == pytest.approx(total.loss, rel=1e-5)
    assert whole.metrics.keys() == total.metrics.keys()
    for key, (amount, count) in whole.metrics.items():
        assert (amount, count) == pytest.approx(total.metrics[key], rel=1e-5)
    losses = task.losses(model, batch) * batch.targets
    assert whole.loss == pytest.approx(float(losses.sum()), rel=1e-5)


@each
def test_run_calls_the_model_once(name, opened):
    task, model, processor, *_ = opened(name)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    task.run(model, encoded(task, model, processor, pictures(3, 0)))
    assert calls == [1]


@each
def test_selecting_nothing_gives_no_examples(name, opened):
    task, model, processor, *_ = opened(name)
    batch = encoded(task, model, processor, pictures(3, 0))
    assert type(batch.select([])) is type(batch)
    assert len(batch.select([])) == 0
    assert batch.select(torch.tensor([], dtype=torch.long)).targets.shape == (0,)
    assert len(batch.to("cpu")) == 3


@each
@pytest.mark.parametrize("engine", list(ENGINES))
def test_gradients_can_be_told_apart_by_example(name, engine, opened):
    """On dummy examples, as in a site's trial, and on pictures."""
    task, model, processor, targets, tower = opened(name)
    model = adapted(model, tower, targets)
    for batch in (task.dummy_batch(model, LENGTH, seed=3), encoded(task, model, processor, pictures(3, 0))):
        assert (batch.targets > 0).all()
        probe(model, task.losses, batch, engine)


@each
def test_dummy_examples_differ_by_seed_and_never_call_the_model(name, opened):
    task, model, *_ = opened(name)

    def refuse(*_):
        raise AssertionError("called")

    handle = model.register_forward_pre_hook(refuse)
    one, same, other = (task.dummy_batch(model, LENGTH, seed=seed) for seed in (1, 1, 2))
    handle.remove()
    losses = [task.losses(model, batch) for batch in (one, same, other)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
    assert losses[0][0] != losses[0][1]
    assert torch.equal(task.losses(model, one.within(model)), losses[0])


@each
def test_bad_records_and_splits_are_refused(name, opened):
    task, model, processor, *_ = opened(name)
    records = pictures(3, 0)
    with pytest.raises(ConfigError, match="truncate"):
        task.encode(processor, records, length=LENGTH, split="blocks", model_config=model.config)
    with pytest.raises(DataError, match=r"record=2 field='image': is a text and no image, .*'image_parquet'.*'images'"):
        encoded(task, model, processor, [records[0], {**records[1], "image": "a secret"}])
    if "label" in task.columns:
        with pytest.raises(DataError, match="record=3 field='label'") as caught:
            encoded(task, model, processor, [*records[:2], {**records[2], "label": "secret"}])
        assert "secret" not in str(caught.value)


@each
def test_at_an_approved_job_a_wrong_record_is_one_without_a_target(name, opened):
    """A job's rules tell something about a record, so only the site's owner sees the faults."""
    task, model, processor, *_ = opened(name)
    records = pictures(4, 0)
    honest = task.losses(model, encoded(task, model, processor, records))
    wrong = {"label": "a secret"} if "label" in task.columns else {"image": np.zeros((1, 200), np.uint8)}
    forgiving = LenientRecords([records[0], {**records[1], "image": "a secret"}, {**records[2], **wrong}, records[3]])
    batch = encoded(task, model, processor, forgiving)
    assert len(forgiving.faults) == 2
    assert not any("secret" in fault for fault in forgiving.faults)
    assert (batch.targets > 0).tolist() == [True, False, False, True]
    losses = task.losses(model, batch)
    assert losses[[1, 2]].tolist() == [0.0, 0.0]
    assert torch.allclose(losses[[0, 3]], honest[[0, 3]], rtol=1e-5)


@each
def test_an_adapter_learns_what_pictures_show(name, opened):
    """A random model learns with plain steps, and is scored on new pictures."""
    task, model, processor, targets, tower = opened(name)
    model = adapted(model, tower, targets)
    seen, unseen = (encoded(task, model, processor, pictures(96, seed)) for seed in (1, 2))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    before = task.tally(model, unseen)
    for _ in range(60):
        rows = torch.randperm(96, generator=generator)[:16]
        optimizer.zero_grad()
        task.losses(model, seen.select(rows)).mean().backward()
        optimizer.step()
    after = task.tally(model, unseen)
    assert after.loss < 0.75 * before.loss
    right = after.metrics["exact_match" if name == "image_text" else "accuracy"]
    assert right[0] / right[1] > 3 / len(NAMES)  # three times as good as guessing
