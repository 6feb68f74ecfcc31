"""MAD-X and the reading of earlier adapters: a stack by hand, and a trained task on another language's adapter."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from offsite.adapter.earlier import earlier_bottlenecks
from offsite.adapter.export import export, load
from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.errors import ConfigError, DataError, MalformedMessage, UnsupportedModel
from tests.families import TOWERS, logits, spec_for, tiny


def moved(model, seed):
    layout = Layout.of(model)
    layout.write(model, layout.read(model) + np.random.default_rng(seed).normal(scale=0.2, size=layout.size))
    return model


@pytest.fixture
def language(tmp_path):
    """Exports a language adapter with random weights, and returns its folder."""

    def make(name, family="llama", rank=3, seed=0, **changes):
        spec = spec_for("bottleneck", family, rank=rank, **changes)
        export(moved(attach(tiny(family), spec), seed), spec, tmp_path / name, base="owner/model")
        return tmp_path / name

    return make


def auxiliary_of(family, *folders):
    return earlier_bottlenecks(folders, spec_for("madx", family).slots)


def stacked_by_hand(family, spec, language, task):
    """Returns a model with one bottleneck after the other in hooks, from the formula and the exported tensors."""
    model = tiny(family)

    def behind(slot):
        def hook(block, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            for values in (language, task):
                parts = [values[f"{slot}.offsite_bottleneck.{part}"] for part in ("down.weight", "down.bias")]
                parts += [values[f"{slot}.offsite_bottleneck.{part}"] for part in ("up.weight", "up.bias")]
                narrow = functional.gelu(hidden @ parts[0].T + parts[1])
                hidden = hidden + narrow @ parts[2].T + parts[3]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    for slot in spec.slots:
        model.get_submodule(slot).register_forward_hook(behind(slot))
    return model


def exported(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TOWERS)
def test_at_its_start_it_is_the_language_adapter_alone(language, family, dtype):
    folder = language("a", family)
    alone = load(tiny(family, dtype), folder)
    stack = attach(tiny(family, dtype), spec_for("madx", family), auxiliary_of(family, folder))
    assert torch.equal(logits(stack, family), logits(alone, family))
    assert not torch.equal(logits(stack, family), logits(tiny(family, dtype), family))


@pytest.mark.parametrize("family", TOWERS)
def test_the_task_adapter_serves_another_language_without_training(language, family, tmp_path):
    """Trained on A of rank 3 and used on B of rank 5: zero-shot transfer, equal to a stack made by hand."""
    one, other = language("a", family), language("b", family, rank=5, seed=7)
    spec = spec_for("madx", family)
    trained = moved(attach(tiny(family), spec, auxiliary_of(family, one)), seed=1)
    export(trained, spec, tmp_path / "task", base="owner/model", auxiliary=auxiliary_of(family, one))
    task = exported(tmp_path / "task")
    assert {name for name in task if name.startswith("given.")} == {f"given.{n}" for n in auxiliary_of(family, one)}
    same, swapped = (
        load(tiny(family), tmp_path / "task"),
        load(tiny(family), tmp_path / "task", auxiliary=auxiliary_of(family, other)),
    )
    assert torch.equal(logits(same, family), logits(trained, family))
    for model, under in ((same, one), (swapped, other)):
        expected = logits(stacked_by_hand(family, spec, exported(under), task), family)
        assert torch.allclose(logits(model, family), expected, atol=2e-5)
        assert not any(p.requires_grad for p in model.parameters())
    assert (logits(same, family) - logits(swapped, family)).abs().max() > 1e-3


def test_an_export_without_its_auxiliary_tensors_is_refused(language, tmp_path):
    auxiliary = auxiliary_of("llama", language("a"))
    spec = spec_for("madx", "llama")
    model = attach(tiny("llama"), spec, auxiliary)
    with pytest.raises(MalformedMessage, match="is missing: pass the tensors that the adapter was attached with"):
        export(model, spec, tmp_path / "t", base="b")
    export(model, spec, tmp_path / "t", base="b", auxiliary=auxiliary)
    with pytest.raises(MalformedMessage, match="is missing"):
        load(tiny("llama"), tmp_path / "t", auxiliary={})


def test_auxiliary_tensors_for_an_adapter_of_peft_are_refused(tmp_path):
    spec = spec_for("lora", "llama")
    export(attach(tiny("llama"), spec), spec, tmp_path / "l", base="b")
    with pytest.raises(MalformedMessage, match="an adapter of peft takes none"):
        load(tiny("llama"), tmp_path / "l", auxiliary={"t": torch.zeros(1)})


def test_targets_are_refused(language):
    with pytest.raises(ConfigError, match="sits after blocks"):
        attach(tiny("llama"), spec_for("madx", "llama", targets=("q_proj",)), auxiliary_of("llama", language("a")))


def test_a_second_adapter_on_a_stack_is_refused(language):
    model = attach(tiny("llama"), spec_for("madx", "llama"), auxiliary_of("llama", language("a")))
    with pytest.raises(UnsupportedModel, match="at most one"):
        attach(model, spec_for("lora", "llama"))


def test_a_folder_without_a_fitting_bottleneck_is_refused_in_a_line(language, tmp_path):
    slots = spec_for("madx", "llama").slots
    lora, open_head = spec_for("lora", "llama"), spec_for("bottleneck", "llama", options=(("head", True),))
    export(attach(tiny("llama"), lora), lora, tmp_path / "lora", base="b")
    export(attach(tiny("llama"), open_head), open_head, tmp_path / "head", base="b")
    elsewhere = language("elsewhere", slots=("model.layers.1",))
    cut = language("cut")
    config = json.loads((cut / "adapter_config.json").read_text())
    config["spec"]["slots"] = config["spec"]["slots"][:1]
    (cut / "adapter_config.json").write_text(json.dumps(config))
    for folder, kind, reason in (
        (tmp_path / "none", DataError, "no such folder"),
        (tmp_path, DataError, "has no adapter_config.json"),
        (tmp_path / "lora", ConfigError, "its method is 'LORA', must be 'bottleneck'"),
        (tmp_path / "head", ConfigError, "trained head"),
        (
            elsewhere,
            ConfigError,
            "its slots are model.layers.1, must be the new adapter's model.layers.0, model.layers.3",
        ),
        (cut, ConfigError, "its slots are model.layers.0, must be"),
    ):
        with pytest.raises(kind, match=reason) as caught:
            earlier_bottlenecks([folder], slots)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"model.layers.3.offsite_bottleneck.down.bias' is missing or was added"):
        earlier_bottlenecks([cut], ("model.layers.0",))
