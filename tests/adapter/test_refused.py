"""Reasons of refusals that a test can show: peft itself attaches the method, which then does what the reason says."""

import peft
import pytest
import torch
from peft.tuners.lora.config import KasaConfig, MontecloraConfig

from tests.families import IDS, tiny

TARGETS = ["q_proj", "v_proj"]


def with_peft(config, base=None):
    torch.manual_seed(0)
    return peft.get_peft_model(tiny("llama") if base is None else base, config)


def lora(**settings):
    return peft.LoraConfig(r=2, target_modules=TARGETS, **settings)


@pytest.mark.parametrize(
    "config",
    [lora(init_lora_weights="pissa"), lora(init_lora_weights="olora"), lora(kasa_config=KasaConfig())],
    ids=["pissa", "olora", "kasa"],
)
def test_the_base_weights_are_rewritten(config):
    base = tiny("llama")
    with_peft(config, base)
    changed = base.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.allclose(changed, tiny("llama").model.layers[0].self_attn.q_proj.weight, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        peft.PveraConfig(r=2, target_modules=TARGETS),
        lora(monteclora_config=MontecloraConfig()),
    ],
    ids=["pvera", "monteclora"],
)
def test_each_forward_pass_of_training_is_another(config):
    model = with_peft(config).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_one_example_depends_on_the_others():
    model = with_peft(peft.LilyConfig(r=2, target_modules=TARGETS))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        among, alone = model(input_ids=IDS).logits[:1], model(input_ids=IDS[:1]).logits
    assert not torch.allclose(among, alone, atol=1e-3)


def test_frozen_factors_are_others_where_weights_are_rounded_otherwise():
    """Changes the weights by a millionth, as another library or processor would."""
    shaken = tiny("llama")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in shaken.parameters():
            parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))
    slots = [f"model.layers.{index}.self_attn.{name}" for index in (0, 3) for name in TARGETS]
    config = peft.FrodConfig(target_modules=slots, progressbar=False)
    here, there = (dict(with_peft(config, base).named_buffers()) for base in (tiny("llama"), shaken))
    moved = [
        float((here[name] - there[name]).norm() / here[name].norm()) for name in here if here[name].is_floating_point()
    ]
    assert max(moved) > 0.1


def test_a_parameter_has_no_part_in_the_loss():
    model = with_peft(lora(monteclora_config=MontecloraConfig()))
    model(input_ids=IDS, labels=IDS).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert any("prior" in name for name in idle)


def test_the_adapter_scores_need_a_task_number():
    with pytest.raises(ValueError, match="task_ids"):
        with_peft(peft.PolyConfig(r=2, target_modules=TARGETS))(input_ids=IDS)
