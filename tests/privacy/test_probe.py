"""The probe refuses each known way in which training is silently not private, and accepts the honest case."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.errors import ConfigError, PrivacyRefusal
from offsite.privacy.engines import ENGINES
from offsite.privacy.probe import choose_engine, probe, single_gradient
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


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.BatchNorm1d(6, track_running_stats=False).eval()])
def test_batch_normalisation_is_refused(norm: nn.Module) -> None:
    """Also in evaluation mode, where it has no statistics of its own."""
    with pytest.raises(PrivacyRefusal, match="module='1' normalises by its batch"):
        choose_engine(nn.Sequential(nn.Linear(6, 6), norm), squares, rows())


def test_frozen_batch_normalisation_is_taken() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6).requires_grad_(False)).eval()
    assert choose_engine(model, squares, rows()) == "bookkeeping"


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
    with pytest.raises(PrivacyRefusal, match="engine='hooks'"):
        probe(model, TASK.losses, examples(), "hooks")
    assert choose_engine(model, TASK.losses, examples()) == "slot"


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 6)


def test_one_example_is_too_few() -> None:
    with pytest.raises(ConfigError, match="probe examples=1 must be at least 2"):
        choose_engine(dense(), squares, rows().select([0]))


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(PrivacyRefusal, match="trainable parameters=0"):
        choose_engine(dense().requires_grad_(False), squares, rows())


def test_dropout_is_refused_where_it_is() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
    with pytest.raises(PrivacyRefusal, match=r"dropout p=0\.5 is active in '1'"):
        choose_engine(model.train(), squares, rows())
    assert choose_engine(model.eval(), squares, rows()) == "bookkeeping"


def test_a_parameter_without_use_is_refused() -> None:
    model = dense()
    model.surplus = nn.Parameter(torch.ones(3))
    with pytest.raises(PrivacyRefusal, match="'surplus': the loss does not depend on it"):
        choose_engine(model, squares, rows())


@pytest.mark.parametrize(("factor", "shown"), [(0.0, "0.0"), (float("nan"), "nan")])
def test_examples_that_prove_nothing_are_refused(factor: float, shown: str) -> None:
    with pytest.raises(PrivacyRefusal, match=f"gradient norm={shown} of probe example 0"):
        choose_engine(dense(), lambda model, batch: squares(model, batch) * factor, rows())


def test_a_loss_that_an_engine_leaves_out_is_refused() -> None:
    def losses(model: nn.Module, batch: Rows) -> Tensor:
        found = squares(model, batch)
        return torch.cat([found[:1] * torch.nan, found[1:]])

    model = dense()
    with ENGINES["bookkeeping"](model) as opened, pytest.raises(PrivacyRefusal, match="losses are not finite"):
        single_gradient(model, losses, rows(), opened, 1)


class Untrained(nn.Module):
    """A layer that fails in training mode, in which Opacus needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("not in training mode")
        return x * self.weight


def test_an_engine_that_fails_is_refused_by_name() -> None:
    with pytest.raises(PrivacyRefusal, match="engine='hooks' fails: not in training mode; use engine='loop'"):
        probe(Untrained().eval(), squares, rows(), "hooks")
    assert choose_engine(Untrained().eval(), squares, rows()) == "slot"


class SquaredLayerNorm(nn.Module):
    """Has the name of a norm, and another arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((6,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.square()


def test_an_engine_with_a_wrong_gradient_is_refused() -> None:
    with pytest.raises(PrivacyRefusal, match="gradient of 'weight' for example 0 is off by"):
        probe(SquaredLayerNorm(), squares, rows(), "bookkeeping")
    assert choose_engine(SquaredLayerNorm(), squares, rows()) == "hooks"


class Gradually(nn.Module):
    """Its outputs are each row's own, and their gradients are not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        mean = y.mean(0)
        return y + 0.5 * (mean - mean.detach())


class Chosen(nn.Module):
    """Couples the rows whose first number is the smallest of all; the first example is not among them."""

    def __init__(self, coupled: Tensor) -> None:
        super().__init__()
        self.inner, self.coupled = nn.Linear(6, 6), coupled

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return torch.where((x[:, :1] == self.coupled), y + 0.1 * y.mean(0), y)


class Crowded(nn.Module):
    """Couples rows in batches of more than four."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y + 0.1 * y.mean(0) if len(x) > 4 else y


def test_rows_that_meet_in_the_backward_pass_only_are_refused() -> None:
    with pytest.raises(PrivacyRefusal, match="gradient of probe example 0 changes by"):
        choose_engine(Gradually(), squares, rows())


@pytest.mark.parametrize("row", range(4))
def test_every_example_is_tried_and_not_only_the_first(row: int) -> None:
    with pytest.raises(PrivacyRefusal, match=f"probe example {row} changes by .* with the others in its batch"):
        choose_engine(Chosen(rows().values[row, 0]), squares, rows())


def test_rows_that_meet_in_a_larger_batch_are_refused() -> None:
    with pytest.raises(PrivacyRefusal, match=r"loss of probe example .* with the others in its batch"):
        choose_engine(Crowded(), squares, rows())


class Remembering(nn.Module):
    """Keeps the mean of its last batch, in a buffer or in an attribute, and uses nothing of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = nn.Linear(6, 6), how
        if how == "buffer":
            self.register_buffer("seen", torch.zeros(6))
        else:
            self.seen = torch.zeros(6) if how == "tensor" else 0.0

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean(0)
        if self.how == "buffer":
            self.seen.copy_(mean)
        else:
            self.seen = mean if self.how == "tensor" else float(mean.sum())
        return self.inner(x)


@pytest.mark.parametrize(("how", "what"), [("buffer", "buffer"), ("tensor", "attribute"), ("number", "attribute")])
def test_a_memory_of_batches_is_refused(how: str, what: str) -> None:
    model = Remembering(how)
    with pytest.raises(PrivacyRefusal, match=f"{what}='.*seen' changes with the batch"):
        choose_engine(model, squares, rows())
    if how == "buffer":
        assert not model.seen.any()


TINY = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
TINY |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 32, "num_experts": 2}


def routed_with_a_limit() -> dict[str, Any]:
    nllb = NllbMoeConfig(**TINY, encoder_sparse_step=1, decoder_sparse_step=1)
    switch = SwitchTransformersConfig(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    return {
        "nllb": NllbMoeForConditionalGeneration(nllb),
        "switch": SwitchTransformersForConditionalGeneration(switch),
    }


@pytest.mark.parametrize("name", ["nllb", "switch"])
def test_experts_with_a_limit_are_refused_by_structure(name: str) -> None:
    """NLLB-MoE passed for some seeds, where no expert was full: nothing is tried, and no record is read."""

    def unused(model: nn.Module, batch: Rows) -> Tensor:
        raise AssertionError("the model was run")

    with pytest.raises(PrivacyRefusal, match="routes tokens to experts up to expert_capacity"):
        choose_engine(routed_with_a_limit()[name].eval(), unused, rows())


def test_experts_without_a_limit_go_to_the_loop() -> None:
    """Their products are over the tokens of all records, whose number decides the rounding."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=3,
    )
    model = MixtralForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj.requires_grad_(True)
    assert choose_engine(model, TASK.losses, examples()) == "loop"
    for engine in ENGINES.keys() - {"loop"}:
        with pytest.raises(PrivacyRefusal, match="multiplies the tokens of one expert together"):
            probe(model, TASK.losses, examples(), engine)
