"""The task head: found by structure, trained in parallel to its frozen self, and removed without a trace."""

import pytest
import torch
import transformers as hf
from peft import PeftModel
from torch import nn

from offsite.adapter.export import export, load
from offsite.adapter.layout import Layout
from offsite.adapter.methods import METHODS, attach, places
from offsite.adapter.methods.task_head import head_path
from offsite.emulator.evaluation.fidelity import visiting
from offsite.errors import UnsupportedModel
from tests.families import SIZES, attach_any, logits, loss, spec_for, tiny
from tests.task import latents

WORDS = {"vocab_size": 97, "pad_token_id": 0}
OPEN = (("head", True),)


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: tiny("bert"), "classifier"),
        (lambda: tiny("vit"), "classifier"),
        (lambda: tiny("llama"), "lm_head"),
        (lambda: tiny("gpt2"), "lm_head"),
        (lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**SIZES, **WORDS, num_labels=3)), "score"),
        (lambda: hf.BertForQuestionAnswering(hf.BertConfig(**SIZES, **WORDS)), "qa_outputs"),
        (lambda: hf.BertForTokenClassification(hf.BertConfig(**SIZES, **WORDS)), "classifier"),
        (lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES, **WORDS)), "cls.predictions.decoder"),
        (lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZES, **WORDS)), "classifier.out_proj"),
    ],
)
def test_the_head_is_found(make, path):
    assert head_path(make()) == path


def test_a_model_without_a_head_is_refused():
    with pytest.raises(UnsupportedModel, match="heads=0"):
        head_path(hf.BertModel(hf.BertConfig(**SIZES, **WORDS), add_pooling_layer=False))
    with pytest.raises(UnsupportedModel, match="heads=0"):
        attach(hf.BertModel(hf.BertConfig(**SIZES, **WORDS), add_pooling_layer=False), spec_for("head", "bert"))
    with pytest.raises(UnsupportedModel, match=r"heads=0.*'conv_out', is a Conv2d"):  # and not the embedding of time
        head_path(latents.unet())


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"head", "clip_adapter", "concept_tokens", "ip_adapter"}))
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_any_method_may_train_the_head_as_well(method, family):
    spec = spec_for(method, family, options=OPEN)
    model = attach_any(tiny(family), spec)
    alone = Layout.of(attach_any(tiny(family), spec_for(method, family)))
    names = Layout.of(model).names
    head = [
        name for name in names if name.endswith(("classifier.offsite_update.weight", "classifier.offsite_update.bias"))
    ]
    assert len(head) == 2
    assert sorted(set(names) - set(head)) == list(alone.names)
    assert torch.equal(logits(model, family), logits(attach_any(tiny(family), spec_for(method, family)), family))
    loss(model, family).backward()
    parameters = dict(model.named_parameters())
    assert all(parameters[name].grad.abs().sum() > 0 for name in head)
    assert all(p.grad is None for p in parameters.values() if not p.requires_grad)


@pytest.mark.parametrize("method", ["ffa_lora", "vera", "bottleneck", "head"])
def test_a_trained_head_is_exported_with_its_adapter(method, tmp_path):
    spec = spec_for(method, "bert", options=OPEN)
    model = attach(tiny("bert"), spec)
    layout = Layout.of(model)
    layout.write(model, layout.read(model) + 0.1)
    export(model, spec, tmp_path, base="owner/model")
    assert torch.equal(logits(load(tiny("bert"), tmp_path), "bert"), logits(model, "bert"))
    assert isinstance(model, PeftModel) == METHODS[method].peft


@pytest.mark.parametrize("method", ["lora", "bottleneck", "head"])
@pytest.mark.parametrize("make", [lambda: tiny("bert"), lambda: hf.RobertaForSequenceClassification(ROBERTA).eval()])
def test_a_visit_leaves_the_head_as_it_was(method, make):
    """The head need not be a child of the model itself; its parent modules are then cloned as well."""
    base = make()
    slots = tuple(name for name, _ in base.named_modules() if name.endswith(("layer.0", "layer.3")))
    before = [(name, id(module), len(module._forward_hooks)) for name, module in base.named_modules()]
    spec = spec_for(method, "bert", slots=slots, options=OPEN)
    inside = places(base, spec)
    with visiting(base, spec) as adapted:
        names = Layout.of(adapted).names
        assert any(f".{inside[-1]}.offsite_update." in f".{name}" for name in names)
    assert [(name, id(module), len(module._forward_hooks)) for name, module in base.named_modules()] == before
    with visiting(base, spec) as adapted:  # and a second time
        assert Layout.of(adapted).names == names


ROBERTA = hf.RobertaConfig(**SIZES, **WORDS)


def test_a_tied_head_is_changed_and_its_embedding_is_not():
    base = tiny("gpt2")
    words = base.transformer.wte.weight
    assert base.lm_head.weight is words
    before = words.detach().clone()
    model = attach(base, spec_for("head", "gpt2"))
    layout = Layout.of(model)
    layout.write(model, layout.read(model) + 0.1)
    assert torch.equal(words, before)
    assert not words.requires_grad
    with torch.no_grad():
        hidden = base.transformer(input_ids=torch.arange(6)[None]).last_hidden_state
        expected = nn.functional.linear(hidden, before + 0.1)
        assert torch.allclose(model(input_ids=torch.arange(6)[None]).logits, expected, atol=1e-5)
