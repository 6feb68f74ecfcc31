"""task.chunked_head: the models that run in chunks, and the models that need all logits at once."""

import copy
import logging
import pickle

import pytest
import torch
import transformers as hf
from torch.func import functional_call, grad
from torch.nn import functional

from offsite.errors import UnsupportedModel
from offsite.privacy.batches import trainable
from offsite.task.causal_lm import CausalLM
from tests.task.tiny import CHANGED, LLAMA, PLAIN, V, batch, build, compare, llama, lora, train_inside


@pytest.mark.parametrize("family", CHANGED)
def test_what_a_model_does_to_its_logits_is_seen(family, caplog):
    model = train_inside(build(family))
    with caplog.at_level(logging.INFO, "offsite.task"):
        task = compare(model, batch(), 0.0)
        task.losses(model, batch())
    assert task.obstacle(model) == "the model changes its logits after the head"
    assert [record.getMessage() for record in caplog.records if "after the head" in record.getMessage()] == [
        "logits of a whole batch are held at once: the model changes its logits after the head"
    ]


def test_a_gemma_without_its_cap_is_done_by_chunks():
    model = train_inside(build("Gemma2", final_logit_softcapping=None))
    assert compare(model, batch(), 1e-5).obstacle(model) == ""


class Llama(hf.LlamaForCausalLM):
    """A model that changes its logits."""

    def forward(self, input_ids):
        output = super().forward(input_ids=input_ids)
        return self.own(output)


class InPlace(Llama):
    def own(self, output):
        output.logits[..., 5] = -1e4
        return output


class Halved(Llama):
    def own(self, output):
        output.logits.div_(2)
        return output


class Cut(Llama):
    def own(self, output):
        output.logits = output.logits[..., : V - 1]
        return output


class Twice(Llama):
    def own(self, output):
        output.logits = self.lm_head(torch.zeros(1, 1, 32)) * 0 + output.logits
        return output


class Functional(Llama):
    def own(self, output):
        hidden = self.model(input_ids=torch.zeros((3, 8), dtype=torch.long)).last_hidden_state
        output.logits = functional.linear(hidden, self.lm_head.weight)
        return output


class Failing(Llama):
    def own(self, output):
        output.logits = output.logits - output.logits.amax(1, keepdim=True)  # fails without tokens
        return output


@pytest.mark.parametrize("kind", [InPlace, Halved, Cut, Twice, Functional, Failing])
def test_a_model_with_logits_of_its_own_is_done_as_it_is(kind):
    torch.manual_seed(0)
    model = train_inside(kind(hf.LlamaConfig(**LLAMA, vocab_size=V, use_cache=False)).eval())
    examples = batch()
    examples.input_ids.clamp_(max=V - 2)
    assert compare(model, examples, 0.0).obstacle(model) != ""


def test_a_model_first_met_in_inference_mode_hides_nothing():
    model, task = (
        InPlace(hf.LlamaConfig(**LLAMA, vocab_size=V, use_cache=False)).eval().requires_grad_(False),
        CausalLM(),
    )
    with torch.inference_mode():
        assert task.tally(model, batch()) == PLAIN.tally(model, batch())
    assert task.obstacle(model) == "the model changes its logits after the head"


def test_a_model_that_changes_its_mind_is_refused():
    model, task = train_inside(build("Gemma2", final_logit_softcapping=None)), CausalLM()
    task.losses(model, batch())
    model.config.final_logit_softcapping = 2.0
    with pytest.raises(UnsupportedModel, match="changes its logits after the head"):
        task.losses(model, batch())
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks


def test_what_trains_decides_every_time():
    model, task = llama(), CausalLM()
    assert task.obstacle(model) == ""
    model.lm_head.requires_grad_(True)
    assert task.obstacle(model) == "the head is trained"
    model.lm_head.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)
    assert task.obstacle(model) == "the input embedding is trained"
    model.model.embed_tokens.requires_grad_(False)
    handle = model.lm_head.register_full_backward_hook(lambda *_: None)
    assert task.obstacle(model) == "the head has hooks"
    handle.remove()
    model.lm_head.forward = lambda hidden: hidden
    assert "torch's own forward" in task.obstacle(model)
    del model.lm_head.forward
    assert task.obstacle(model) == ""


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_head_or_embedding_gets_its_gradient(tied):
    model = train_inside(build("Llama", tie_word_embeddings=tied), tables=True)
    assert compare(model, batch(), 0.0).obstacle(model) == "the head is trained"


def test_a_model_wrapped_by_peft_is_done_by_chunks():
    model = lora()
    assert len(trainable(model)) == 4
    assert compare(model, batch(), 1e-5).obstacle(model) == ""


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["v_proj"], "trainable_token_indices": [1, 2]},
    ],
)
def test_an_adapter_on_the_head_or_the_embedding_is_left_alone(settings):
    model = lora(**settings)
    assert compare(model, batch(), 0.0).obstacle(model) != ""


def test_transforms_of_torch_func_see_all_logits():
    model, task = llama(attn_implementation="eager"), CausalLM(chunk=3)
    task.losses(model, batch())
    seen = []

    class Losses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(model)

        def forward(self):
            seen.append(task.obstacle(self.inner))
            return task.losses(self.inner, batch()).sum()

    weights = {f"inner.{name}": parameter.detach() for name, parameter in trainable(model).items()}
    found = grad(lambda values: functional_call(Losses(), values, ()))(weights)
    losses = task.losses(model, batch()).sum()
    expected = torch.autograd.grad(losses, list(trainable(model).values()))
    assert seen == ["a transform of torch.func is active"]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found.values(), expected, strict=True))


def test_trying_a_model_out_draws_no_random_numbers():
    model = llama(attention_dropout=0.5).train()
    before = torch.get_rng_state()
    assert CausalLM().obstacle(model) == ""
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_found_of_a_model_goes_with_it():
    task = CausalLM()
    task.losses(llama(), batch())
    assert len(task._tried) == len(task._logged) == 0


def test_a_task_travels_to_other_processes_without_what_it_found():
    model, task = llama(), CausalLM(chunk=5)
    task.losses(model, batch())
    there = pickle.loads(pickle.dumps(task))
    assert there._chunk == 5
    assert len(there._tried) == 0
