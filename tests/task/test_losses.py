"""task.causal_lm: the loss by other routes than the code's."""

import copy

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from offsite.task.causal_lm import CausalLM
from offsite.task.examples import Examples

TASK = CausalLM()


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=97, use_cache=False, **changes)).eval()


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=97, use_cache=False)).eval()


def batch(lengths=(8, 5, 2), width=8, pad=0):
    ids = torch.randint(1, 97, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    return Examples(ids * mask + pad * (1 - mask), mask)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_losses_agree_with_a_float64_sum_token_by_token(make):
    model, examples = make(), batch()
    found = TASK.losses(model, examples).detach().numpy()
    for row in range(3):
        count = int(examples.attention_mask[row].sum())
        ids = examples.input_ids[row, :count]  # alone and without padding
        logits = model(input_ids=ids[None]).logits[0].detach().double().numpy()
        nll = [np.log(np.exp(logits[at]).sum()) - logits[at, ids[at + 1]] for at in range(count - 1)]
        assert found[row] == pytest.approx(np.mean(nll), rel=1e-6)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_one_example_has_the_loss_transformers_reports(make):
    model, examples = make(), batch((8,))
    expected = model(input_ids=examples.input_ids, labels=examples.input_ids).loss
    assert torch.allclose(TASK.losses(model, examples)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_mean_over_a_padded_batch_is_not_what_transformers_reports(make):
    model, examples = make(), batch()
    labels = examples.input_ids.masked_fill(examples.attention_mask == 0, -100)
    pooled = model(input_ids=examples.input_ids, attention_mask=examples.attention_mask, labels=labels).loss
    tally = TASK.tally(model, examples)
    total, count = tally.loss, tally.targets
    assert float(pooled.detach()) == pytest.approx(total / count, rel=1e-6)
    assert abs(float(TASK.losses(model, examples).mean().detach()) - total / count) > 1e-3


@pytest.mark.parametrize("make", [llama, gpt2])
def test_padding_values_never_matter_and_a_mask_would_change_nothing(make):
    model = make()
    plain, other = batch(pad=0), batch(pad=55)
    assert torch.equal(TASK.losses(model, plain), TASK.losses(model, other))
    masked = model(input_ids=plain.input_ids, attention_mask=plain.attention_mask).logits
    bare = model(input_ids=plain.input_ids).logits
    keep = plain.attention_mask.bool()
    assert torch.allclose(masked[keep], bare[keep], atol=1e-6)


def test_losses_work_under_vmap_of_grad():
    model, examples = llama(attn_implementation="eager"), batch()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    class Losses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(model)

        def forward(self, ids, mask):
            return TASK.losses(self.inner, Examples(ids[None], mask[None]))[0]

    def one(parameters, ids, mask):
        return functional_call(Losses(), {f"inner.{name}": p for name, p in parameters.items()}, (ids, mask))

    found = vmap(grad(one), in_dims=(None, 0, 0))(weights, examples.input_ids, examples.attention_mask)
    for row in range(3):
        model.zero_grad()
        TASK.losses(model, examples.select([row]))[0].backward()
        for name, parameter in model.named_parameters():
            assert torch.allclose(found[name][row], parameter.grad, rtol=1e-4, atol=1e-6), name


def test_half_precision_logits_are_summed_in_float32():
    examples = batch()
    exact = TASK.losses(llama(), examples)
    rough = TASK.losses(llama().to(torch.bfloat16), examples)
    assert rough.dtype == torch.float32
    assert torch.allclose(exact, rough, atol=2e-2)


def test_an_example_without_targets_costs_nothing():
    assert TASK.losses(llama(), batch((1, 8)))[0] == 0
    assert TASK.tally(llama(), batch((1,))).targets == 0
