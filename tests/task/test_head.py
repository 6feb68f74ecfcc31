"""task.chunked_head: losses in chunks against brute force and against all logits at once."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offsite.adapter.targets import is_linear
from offsite.privacy.batches import trainable
from offsite.privacy.engines import ENGINES
from offsite.privacy.probe import single_gradient
from offsite.task.causal_lm import CausalLM
from offsite.task.chunked_head import TokenLosses
from offsite.task.spec import Tally
from tests.task.tiny import CHUNKED, PLAIN, V, batch, build, close, compare, gradient, llama, lora, train_inside


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 5, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_losses_and_gradients_are_those_of_the_definition(dtype, tolerance, chunk, bias):
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(10, 6, generator=draw).to(dtype), torch.randn(V, 6, generator=draw).to(dtype)
    shift = torch.randn(V, generator=draw).to(dtype) if bias else None
    targets, outer = torch.randint(V, (10,), generator=draw), torch.randn(10, generator=draw).to(dtype)

    logits = hidden.double().numpy() @ weight.double().numpy().T + (0 if shift is None else shift.double().numpy())
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log(shares[np.arange(10), targets.numpy()])
    shares[np.arange(10), targets.numpy()] -= 1
    slopes = outer.double().numpy()[:, None] * (shares @ weight.double().numpy())

    hidden.requires_grad_(True)
    losses = TokenLosses.apply(hidden, targets, weight, shift, chunk)
    (found,) = torch.autograd.grad(losses, hidden, outer)
    assert losses.dtype == found.dtype == dtype
    assert np.allclose(losses.detach().numpy(), expected, rtol=tolerance, atol=tolerance)
    assert np.allclose(found.numpy(), slopes, rtol=tolerance, atol=tolerance)


def test_logits_far_apart_neither_overflow_nor_vanish():
    hidden = torch.tensor([[1e4], [1e4]], requires_grad=True)
    losses = TokenLosses.apply(hidden, torch.tensor([0, 1]), torch.tensor([[1.0], [-1.0]]), None, 2)
    assert losses.tolist() == [0.0, 2e4]
    assert torch.autograd.grad(losses.sum(), hidden)[0].tolist() == [[0.0], [2.0]]


@pytest.mark.parametrize("family", CHUNKED)
def test_every_family_that_returns_its_heads_output_is_done_by_chunks(family):
    model = train_inside(build(family))
    assert compare(model, batch(), 1e-5).obstacle(model) == ""


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX", "OPT", "Falcon", "Phi"])
def test_in_float64_nothing_is_rounded(family):
    """Without families with RMS norms, which transformers always computes in float32."""
    model = train_inside(build(family)).double()
    for chunk in (1, 4, 100):
        assert compare(model, batch(), 1e-10, chunk).obstacle(model) == ""


@pytest.mark.parametrize("chunk", [1, 2, 5, 13, 100])
def test_the_size_of_a_chunk_does_not_matter(chunk):
    compare(llama(), batch(), 1e-5, chunk)


class Largest(TorchDispatchMode):
    """Records the largest number of rows of a tensor whose rows are as long as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # (32, V) is the head's own weight, transposed
            if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[-1] == V and leaf.shape != (32, V):
                self.rows = max(self.rows, leaf.numel() // V)
        return result


@pytest.mark.parametrize(("chunk", "rows"), [(3, 3), (5, 5), (None, 24)])
def test_no_more_than_one_chunks_logits_exist(chunk, rows):
    model, task = llama(), CausalLM(chunk)
    with Largest() as seen:
        task.losses(model, batch()).sum().backward()
    assert seen.rows == rows


def test_rows_without_targets_have_no_gradient_and_padding_none_either():
    model = llama()
    examples = batch((1, 0, 8, 4))
    losses = CausalLM(chunk=2).losses(model, examples)
    assert losses[:2].tolist() == [0.0, 0.0]
    assert not gradient(model, losses[:2]).any()
    hidden = []
    handle = model.model.norm.register_forward_hook(lambda _, __, output: hidden.append(output))
    losses = CausalLM(chunk=2).losses(model, examples)
    handle.remove()
    (found,) = torch.autograd.grad(losses.sum(), hidden[-1])
    assert torch.equal(found.abs().sum(-1) > 0, torch.arange(8)[None] < examples.targets[:, None])


def test_the_length_of_another_record_changes_no_bit():
    """In a product over all scored positions, their number decides how each of them is rounded: one is a vector."""
    model, losses, gradients = llama(), [], []
    for others in (1, 2, 17, 40):
        examples = batch((2, others, others), width=40)
        loss = CausalLM().losses(model, examples)[:1]
        losses.append(loss.detach())
        gradients.append(gradient(model, loss))
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert all(torch.equal(found, gradients[0]) for found in gradients)


@pytest.mark.parametrize("examples", [batch((1, 1), width=1), batch().select([]), batch((0, 0))])
def test_nothing_to_predict_costs_nothing(examples):
    model = train_inside(build("GPT2" if len(examples) else "Falcon"))  # most models fail on an empty batch
    task = compare(model, examples, 0.0)
    assert task.obstacle(model) == ""
    assert task.losses(model, examples).tolist() == [0.0] * len(examples)
    assert task.tally(model, examples) == Tally(0.0, 0, {"perplexity": (0.0, 0)})


def test_sums_are_the_same_with_and_without_a_tape():
    model, task = llama(), CausalLM(chunk=4)
    expected = PLAIN.tally(model, batch())
    assert expected.targets == int(batch().targets.sum()) > 0
    with torch.inference_mode():
        untaped = task.tally(model, batch())
    for found in (task.tally(model, batch()), untaped):
        assert found.targets == expected.targets
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def test_half_precision_and_autocast_are_as_they_were():
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
        compare(llama().to(dtype), batch(), tolerance)
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        compare(model, batch(), 2e-2)


def test_gradient_checkpointing_changes_nothing():
    model = llama()
    expected = gradient(model, PLAIN.losses(model, batch()))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert CausalLM().obstacle(model) == ""
    assert close(gradient(model, CausalLM(chunk=4).losses(model, batch())), expected, 1e-5)


def test_second_derivatives_are_refused():
    model = llama()
    losses = CausalLM().losses(model, batch())
    parameters = list(trainable(model).values())
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(losses.sum(), parameters, create_graph=True)


def test_one_graph_serves_every_example():
    model = llama()
    losses = CausalLM(chunk=3).losses(model, batch())
    for row in range(3):
        (alone,) = CausalLM().losses(model, batch().select([row]))
        parameters = list(trainable(model).values())
        kept = torch.autograd.grad(losses[row], parameters, retain_graph=True)
        for found, expected in zip(kept, torch.autograd.grad(alone, parameters), strict=True):
            assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_sees_each_example_alone_from_the_first_call(engine):
    """The trial of a model runs while the engine's hooks are on it, and leaves nothing in the hooks."""
    model, task = lora(), CausalLM(chunk=3)
    with ENGINES[engine](model) as opened:
        found = [single_gradient(model, task.losses, batch(), opened, row) for row in range(3)]
    assert task.obstacle(model) == ""
    for row, parts in enumerate(found):
        alone = gradient(model, PLAIN.losses(model, batch().select([row])))
        assert close(torch.cat([part.flatten() for part in parts.values()]).float(), alone, 1e-5)


@pytest.mark.parametrize("family", CHUNKED)
def test_a_run_calls_each_block_once_and_no_more_than_one_position_of_the_head(family):
    """Compressors take every call of a model for public examples, so a trial would count as an example."""
    model, calls, sizes = build(family), [], []
    task = CausalLM()
    examples = batch()
    for name, module in model.named_modules():
        if is_linear(module):
            module.register_forward_hook(lambda _, args, out, name=name: calls.append((name, args[0].shape[:-1])))
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: sizes.append(out.numel()))
    task.run(model, examples)
    assert len({name for name, _ in calls}) == len(calls) > 2
    assert sizes == [len(examples) * model.get_output_embeddings().weight.shape[0]]
