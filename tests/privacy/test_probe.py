"""The probe refuses each known way in which training is silently not private, and accepts the honest case."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.errors import PrivacyRefusal
from offsite.privacy.probe import choose_engine, probe
from offsite.task.causal_lm import CausalLM
from offsite.task.examples import Examples

TASK = CausalLM()


def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def examples() -> Examples:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 97, (3, 12), generator=generator)
    return Examples(ids, torch.ones_like(ids))


def lora(**changes: Any) -> Any:
    spec = AdapterSpec(method="ffa_lora", slots=("model.layers.0", "model.layers.3"), **changes)
    return attach(tiny(), spec)


def test_an_honest_adapter_passes_and_is_left_as_it_was() -> None:
    model = lora()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert choose_engine(model, TASK.losses, examples()) == "bookkeeping"
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0)


def test_prompt_tuning_is_refused_under_hooks_and_right_under_the_loop() -> None:
    """Opacus gives the prompt one gradient row for the whole batch, and no error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
        model = get_peft_model(tiny(), config).eval()

    def losses(network: nn.Module, batch: Examples) -> Tensor:
        logits = network(input_ids=batch.input_ids).logits[:, 4:-1]
        flat = nn.functional.cross_entropy(logits.reshape(-1, 97), batch.input_ids[:, 1:].reshape(-1), reduction="none")
        return flat.reshape(len(batch), -1).mean(1)

    with pytest.raises(PrivacyRefusal, match="one row for each"):
        probe(model, losses, examples(), "hooks")
    assert choose_engine(model, losses, examples()) == "loop"


def test_a_token_mean_over_the_batch_is_refused() -> None:
    def coupled(model: nn.Module, batch: Examples) -> Tensor:
        loss = model(input_ids=batch.input_ids, labels=batch.input_ids).loss
        return loss.repeat(len(batch))

    with pytest.raises(PrivacyRefusal, match="others in its batch"):
        choose_engine(lora(), coupled, examples())


def test_one_loss_for_the_whole_batch_is_refused() -> None:
    with pytest.raises(PrivacyRefusal, match="one loss per example"):
        choose_engine(lora(), lambda model, batch: TASK.losses(model, batch).mean(), examples())


class Rows:
    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def select(self, indices: Any) -> "Rows":
        return Rows(self.values[torch.as_tensor(np.asarray(indices))])


def squares(model: nn.Module, rows: Rows) -> Tensor:
    return model(rows.values).square().flatten(1).mean(1)


def rows() -> Rows:
    return Rows(torch.randn(4, 6, generator=torch.Generator().manual_seed(3)))


def test_trained_batch_normalisation_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    with pytest.raises((PrivacyRefusal, ValueError)):
        choose_engine(model, squares, rows())


class Contrastive(nn.Module):
    """Each output minus half the mean of its batch, as in contrastive losses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y - 0.5 * y.mean(0)


def test_a_loss_over_the_whole_batch_is_refused() -> None:
    with pytest.raises(PrivacyRefusal, match="others in its batch"):
        choose_engine(Contrastive(), squares, rows())


class Dropping(nn.Module):
    """A trainable layer with a dropout of its own, which torch does not know as dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x * self.weight, 0.5, training=True)


def test_dropout_inside_a_slot_is_refused() -> None:
    with pytest.raises(PrivacyRefusal, match="randomness"):
        choose_engine(Dropping(), squares, rows())


class Flattening(nn.Module):
    """Passes its layer one row per position instead of one row per example, as OPT's feed-forward does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, 3)).reshape(len(x), -1)


def test_a_layer_that_flattens_the_batch_is_refused_under_hooks() -> None:
    with pytest.raises(PrivacyRefusal, match="one row for each"):
        probe(Flattening(), squares, rows(), "hooks")
    assert choose_engine(Flattening(), squares, rows()) == "loop"


@pytest.mark.parametrize("method", ["ia3", "miss"])
def test_methods_that_opacus_cannot_see_go_to_the_slot_engine(method: str) -> None:
    model = attach(tiny(), AdapterSpec(method=method, slots=("model.layers.0",)))
    with pytest.raises((PrivacyRefusal, RuntimeError, ValueError, AttributeError, NotImplementedError)):
        probe(model, TASK.losses, examples(), "hooks")
    assert choose_engine(model, TASK.losses, examples()) == "slot"
