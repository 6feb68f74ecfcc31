"""The promises of every entry of task.tasks.TASKS; a new entry inherits all tests by its sample in `task_samples`."""

import copy
import json
import socket

import pytest
import torch

from offsite.emulator.structure.from_config import AUTO
from offsite.emulator.structure.towers import token_embeddings
from offsite.errors import ConfigError, DataError, UnknownName
from offsite.task.spec import Tally
from offsite.task.tasks import TASKS
from offsite.task.tokenizer import Tokenizer
from tests.task_samples import SAMPLES

each = pytest.mark.parametrize("sample", SAMPLES, ids=str)


class Loaded:
    """A task with a loaded model, and three examples of different sizes."""

    def __init__(self, sample, folder):
        self.sample, self.task = sample, TASKS[sample.task]
        self.model = self.task.load(folder, dtype=torch.float32)
        self.processor = self.task.load_processor(folder)
        self.batch = self.encode(sample.records(3, 1))

    def encode(self, records, length=None, split="truncate"):
        length = length or self.sample.length
        return self.task.encode(self.processor, records, length=length, split=split, model_config=self.model.config)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Each sample, loaded once and without network."""
    found = {}

    def refuse(*_):
        raise AssertionError("the network was asked")

    def open_one(sample):
        if str(sample) not in found:
            folder = sample.save(tmp_path_factory.mktemp("model"))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(socket.socket, "connect", refuse)
                patch.setattr(socket, "getaddrinfo", refuse)
                found[str(sample)] = Loaded(sample, folder)
        return found[str(sample)]

    return open_one


@pytest.fixture
def loaded(sample, opened):
    """A sample with a model of its own, which a test may train."""
    own = copy.copy(opened(sample))
    own.model = copy.deepcopy(own.model)
    return own


def gradient(model, losses):
    model.zero_grad()
    losses.sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


def train(model, part):
    """Makes all parameters trainable, or, as for an adapter, only those between the word embeddings."""
    model.requires_grad_(True)
    if part == "inside":
        for table in tables(model):
            table.requires_grad_(False)


def tables(model):
    """Returns the word embeddings at the ends of a model, where the model has any."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [*token_embeddings(model), *([] if head is None else [head])]


# Tasks whose examples have one size, and whose faulty records are refused by place; tests/task covers them.
WITHOUT_TOKENS = {"image", "latents"}

parts = pytest.mark.parametrize("part", ["everything", "inside"])


def test_every_task_has_a_tiny_model_here():
    assert {sample.task for sample in SAMPLES} == set(TASKS)
    assert all(name == task.name for name, task in TASKS.items())


@each
def test_its_kind_loads_its_models_and_its_columns_are_those_of_its_records(sample):
    task = TASKS[sample.task]
    assert task.kind in AUTO
    assert all(set(record) == set(task.columns) for record in sample.records(3, 1))
    for field, kind in task.columns.items():
        assert all(isinstance(record[field], kind) for record in sample.records(3, 1))


@each
def test_a_loaded_model_is_frozen_in_eval_mode_and_keeps_no_cache(loaded):
    assert not loaded.model.training
    assert not getattr(loaded.model.config, "use_cache", False)
    assert not any(p.requires_grad for p in loaded.model.parameters())


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_one_finite_float32_number_per_example(loaded, dtype):
    losses = loaded.task.losses(loaded.model.to(dtype), loaded.batch)
    assert losses.shape == (3,)
    assert losses.dtype == torch.float32
    assert torch.isfinite(losses).all()
    assert (losses > 0).all()


@each
def test_no_example_touches_another(loaded):
    task, model, batch = loaded.task, loaded.model, loaded.batch
    together = task.losses(model, batch)
    alone = torch.cat([task.losses(model, batch.select([index])) for index in range(3)])
    assert torch.allclose(together, alone, rtol=1e-5)
    assert torch.allclose(task.losses(model, batch.select([2, 0, 1])), together[[2, 0, 1]], rtol=1e-5)


@each
def test_the_room_that_is_left_for_larger_examples_changes_nothing(loaded):
    """The same records with more padding have the same losses and targets."""
    records, length = loaded.sample.records(3, 1), loaded.sample.length
    short, long = (loaded.encode(records, length=size) for size in (length, length + 8))
    if "image" in loaded.task.columns:
        pytest.skip("images have one size")
    assert short.targets.tolist() == long.targets.tolist()
    first, second = (loaded.task.losses(loaded.model, batch) for batch in (short, long))
    assert torch.allclose(first, second, rtol=2e-5)


@parts
@each
def test_the_gradient_of_one_loss_is_the_gradient_of_that_example_alone(loaded, part):
    task, model, batch = loaded.task, loaded.model, loaded.batch
    train(model, part)
    for index in range(3):
        together = gradient(model, task.losses(model, batch)[index])
        alone = gradient(model, task.losses(model, batch.select([index])))
        assert (together - alone).norm() < 1e-5 * alone.norm()


@pytest.fixture
def failing(monkeypatch):
    """A tokenizer's process that ends on every request with the word FAILS, as it may at a site, and on no other."""
    answers = Tokenizer._answers

    def fail(self, requests, most):
        found = answers(self, requests, most)
        return [[] if "FAILS" in json.dumps(one) else own for one, own in zip(requests, found, strict=True)]

    monkeypatch.setattr(Tokenizer, "_answers", fail)


def broken(sample):
    """A sample's records, of which the processor fails on the second."""
    first, second, third = sample.records(3, 1)
    main = next(iter(second))
    if sample.task == "chat":
        return [first, {"messages": [{"role": "assistant", "content": "FAILS"}]}, third]
    if sample.task == "extractive_qa":
        return [first, second | {"question": "FAILS"}, third]
    if sample.task == "prompt_completion":
        return [first, second | {"completion": "FAILS"}, third]
    if isinstance(second[main], list):
        return [first, second | {main: ["FAILS"], "labels": second["labels"][:1]}, third]
    return [first, second | {main: "FAILS"}, third]


@pytest.mark.usefixtures("failing")
@parts
@each
def test_an_example_without_a_target_has_no_loss_and_no_gradient(loaded, part):
    if WITHOUT_TOKENS & set(loaded.task.columns):
        pytest.skip("every image is one")
    train(loaded.model, part)
    batch = loaded.encode(broken(loaded.sample))
    assert len(batch) == 3
    assert batch.targets[1] == 0
    assert (batch.targets[[0, 2]] > 0).all()
    losses = loaded.task.losses(loaded.model, batch)
    assert losses[1] == 0.0
    assert torch.isfinite(losses).all()
    assert not gradient(loaded.model, losses[1:2]).any()


@each
def test_a_batch_keeps_only_what_the_model_knows(loaded):
    """No example is lost, and examples that the model knows completely do not change."""
    within = loaded.batch.within(loaded.model)
    assert len(within) == 3
    assert within.targets.tolist() == loaded.batch.targets.tolist()
    found, expected = (loaded.task.losses(loaded.model, one) for one in (within, loaded.batch))
    assert torch.equal(found, expected)


@each
def test_a_tally_is_the_sums_behind_the_means(loaded):
    task, model, batch = loaded.task, loaded.model, loaded.batch
    total = task.tally(model, batch)
    singles = [task.tally(model, batch.select([index])) for index in range(3)]
    assert total.targets == sum(one.targets for one in singles) == int(batch.targets.sum())
    assert total.loss == pytest.approx(sum(one.loss for one in singles), rel=1e-5)
    means = [one.loss / one.targets for one in singles]
    assert task.losses(model, batch).tolist() == pytest.approx(means, rel=1e-5)
    added = singles[0] + singles[1] + singles[2] + Tally(0.0, 0)
    assert added.means() == pytest.approx(total.means(), rel=1e-5)
    assert all(torch.isfinite(torch.tensor(value)) for value in total.means().values())


@each
def test_a_run_calls_the_model_once(loaded):
    calls = []
    loaded.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    loaded.task.run(loaded.model, loaded.batch)
    assert calls == [False]


@each
def test_a_dummy_batch_is_two_records_that_depend_on_the_seed_alone(loaded):
    task, model = loaded.task, loaded.model
    one, same, other = (task.dummy_batch(model, loaded.sample.length, seed=seed) for seed in (1, 1, 2))
    assert len(one) == 2
    assert (one.targets > 0).all()
    assert one.within(model).targets.tolist() == one.targets.tolist()
    first, again, second = (task.losses(model, batch) for batch in (one, same, other))
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@each
def test_selecting_nothing_gives_no_examples(loaded):
    none = loaded.batch.select([])
    assert type(none) is type(loaded.batch)
    assert len(none) == 0
    assert none.targets.tolist() == []


@each
def test_bad_encodings_are_refused(loaded):
    records = loaded.sample.records(3, 1)
    with pytest.raises((UnknownName, ConfigError), match=r"split|blocks"):
        loaded.encode(records, split="block")
    with pytest.raises(DataError, match="examples=0"):
        loaded.encode([])
    if not WITHOUT_TOKENS & set(loaded.task.columns):
        with pytest.raises(ConfigError, match="length=1"):
            loaded.encode(records, length=1)
