"""The Fisher mask against brute force: every example's gradient on its own, by a batch of one and by finite steps."""

import copy

import pytest
import torch

from offsite.adapter.methods.masked import largest
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.evaluation.fisher import empirical_fisher, fisher_places
from offsite.errors import DataError
from offsite.task.tasks import TASKS

TASK = TASKS["causal_lm"]
DENSITY = 0.05


@pytest.fixture
def spec(llama):
    options = (("by", "fisher"), ("density", DENSITY))
    return AdapterSpec(
        "masked", slots=("model.layers.0", "model.layers.4"), targets=("q_proj", "v_proj"), options=options
    )


@pytest.fixture
def examples(llama):
    batches = [TASK.dummy_batch(llama.model, 9, seed=seed) for seed in range(3)]
    return _Several(batches)


class _Several:
    """Joins two batches of records."""

    def __init__(self, batches, rows=None):
        self.batches = batches
        self.rows = rows if rows is not None else [(b, r) for b in range(len(batches)) for r in range(2)]

    def __len__(self):
        return len(self.rows)

    def select(self, indices):
        (index,) = indices  # the mask promises one example at a time
        batch, row = self.rows[index]
        return self.batches[batch].select([row])


def by_hand(model, path, examples):
    """The mean of squared gradients, from backward passes of a deep copy."""
    model = copy.deepcopy(model).float().requires_grad_(True)
    weight, total = model.get_submodule(path).weight, 0
    for row in range(len(examples)):
        model.zero_grad()
        TASK.losses(model, examples.select([row]))[0].backward()
        total = total + weight.grad.double() ** 2
    return total / len(examples)


def test_it_is_the_mean_of_squares_of_single_gradients(llama, spec, examples):
    path = "model.layers.0.self_attn.q_proj"
    weights = {"w": llama.model.get_submodule(path).weight}
    found = empirical_fisher(llama.model, weights, TASK, examples)["w"]
    right = by_hand(llama.model, path, examples)
    assert float((found - right).norm() / right.norm()) < 1e-5
    # One gradient of the mean loss, squared, is something else, by far.
    assert float((found - _square_of_mean(llama.model, path, examples)).norm() / right.norm()) > 0.1


def _square_of_mean(model, path, examples):
    model = copy.deepcopy(model).requires_grad_(True)
    losses = [TASK.losses(model, examples.select([row]))[0] for row in range(len(examples))]
    torch.stack(losses).mean().backward()
    return model.get_submodule(path).weight.grad ** 2


def test_an_entry_by_finite_differences(llama, examples):
    path = "model.layers.4.self_attn.v_proj"
    model = copy.deepcopy(llama.model).double()
    found = empirical_fisher(llama.model, {"w": llama.model.get_submodule(path).weight}, TASK, examples)["w"]
    weight, place, step, squares = model.get_submodule(path).weight, int(found.argmax()), 1e-4, []
    for row in range(len(examples)):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.view(-1)[place] += sign * step
                losses.append(float(TASK.losses(model, examples.select([row]))[0]))
                weight.view(-1)[place] -= sign * step
        squares.append(((losses[0] - losses[1]) / (2 * step)) ** 2)
    assert float(found.view(-1)[place]) == pytest.approx(sum(squares) / len(squares), rel=1e-2)


def test_the_places_are_the_top_share_of_each_matrix_and_others_than_by_magnitude(llama, spec, examples):
    given = fisher_places(llama.model, spec, TASK, examples)
    assert len(given) == 4
    for name, places in given.items():
        path = name.removesuffix(".places")
        weight, right = llama.model.get_submodule(path).weight, by_hand(llama.model, path, examples).flatten()
        count = round(DENSITY * weight.numel())
        assert places.dtype == torch.int32
        assert places.tolist() == sorted(set(places.tolist()))
        assert len(places) == count
        rest = torch.ones(weight.numel(), dtype=torch.bool)
        rest[places.long()] = False
        assert float(right[places.long()].min()) >= float(right[rest].max()) * (1 - 1e-4)
        assert places.tolist() != largest(weight, count).tolist()


def test_of_equal_entries_the_first_are_taken(llama, spec, examples):
    """With equal losses, no gradient distinguishes entries."""

    class Flat:
        def losses(self, model, batch):
            return 0 * model.get_submodule("model.layers.0.self_attn.q_proj").weight.sum().reshape(1)

    for places in fisher_places(llama.model, spec, Flat(), examples).values():
        assert places.tolist() == list(range(len(places)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_is_left_as_it_was(make, spec, dtype):
    model = make("llama_tied", dtype).model.train()
    model.model.embed_tokens.weight.requires_grad_(True)
    before = {n: (id(p), p.dtype, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    buffers = {name: (b.dtype, b.clone()) for name, b in model.named_buffers()}
    examples = _Several([TASK.dummy_batch(model, 9, seed=1)])
    given = fisher_places(model, spec, TASK, examples)
    wide = make("llama_tied", dtype).model.float().eval()
    assert all(torch.equal(t, given[n]) for n, t in fisher_places(wide, spec, TASK, examples).items())
    for name, parameter in model.named_parameters():
        kind, dtype_before, flag, values = before[name]
        assert (id(parameter), parameter.dtype, parameter.requires_grad) == (kind, dtype_before, flag)
        assert torch.equal(parameter, values)
        assert parameter.grad is None
    assert all(b.dtype == buffers[n][0] and torch.equal(b, buffers[n][1]) for n, b in model.named_buffers())
    assert model.training


def test_without_public_examples_it_is_refused(llama, spec, examples):
    with pytest.raises(DataError, match="public examples=0"):
        fisher_places(llama.model, spec, TASK, _Several(examples.batches, []))
