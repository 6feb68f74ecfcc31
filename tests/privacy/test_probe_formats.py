"""The probe in 16 bits refuses the same silent faults as in float32, also those smaller than the format's rounding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.errors import PrivacyRefusal
from offsite.privacy.batches import trainable
from offsite.privacy.engines import ENGINES
from offsite.privacy.probe import choose_engine, probe
from offsite.privacy.tolerances import Tolerances
from tests.contracts.test_engines import TASK, adapted, ragged
from tests.privacy.test_probe import Rows, SquaredLayerNorm, rows

formats = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
WEAK = 0.02  # of a coupling; below what bfloat16 may round between two sizes of a batch
Fault = Callable[[Tensor], Tensor]


class Narrow(nn.Module):
    """A frozen layer in 16 bits with a trained layer in float32 beside it, and a fault behind both."""

    def __init__(self, dtype: torch.dtype, fault: Fault = lambda y: y) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.frozen = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))).to(dtype).requires_grad_(False)
            self.inner = nn.Linear(6, 6)
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.frozen(x.to(self.frozen[0].weight.dtype))
        return self.fault(hidden + self.inner(hidden.float()).to(hidden.dtype))


def squares(model: nn.Module, batch: Rows) -> Tensor:
    return model(batch.values).float().square().flatten(1).mean(1)


def by_mean(y: Tensor) -> Tensor:
    return y + WEAK * y.mean(0)


def by_largest(y: Tensor) -> Tensor:
    """Rounds by the largest number of the batch, as dynamic quantisation does."""
    step = y.detach().abs().max() / 127
    return y + ((y / step).round() * step - y).detach()


def backwards(y: Tensor) -> Tensor:
    mean = y.mean(0)
    return y + WEAK * (mean - mean.detach())


def crowded(y: Tensor) -> Tensor:
    return y + WEAK * y.mean(0) if len(y) > 4 else y


def by_number(y: Tensor) -> Tensor:
    return y / len(y)


def by_chance(y: Tensor) -> Tensor:
    return y * (torch.rand(y.shape) > 0.1)


@formats
def test_an_honest_model_passes_with_the_first_engine(dtype: torch.dtype) -> None:
    assert choose_engine(Narrow(dtype), squares, rows()) == "bookkeeping"


@formats
@pytest.mark.parametrize("fault", [by_mean, by_largest, backwards, crowded, by_number, by_chance])
def test_a_fault_is_refused_also_where_it_is_smaller_than_the_rounding(fault: Fault, dtype: torch.dtype) -> None:
    model = Narrow(dtype, fault)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        with pytest.raises(PrivacyRefusal, match=r"with the others in its batch|randomness"):
            choose_engine(model, squares, rows())


def test_the_weak_faults_pass_what_only_allows_for_rounding() -> None:
    """So the tests above are no tests of the tolerance between sizes, but of the one between companies."""
    assert Tolerances.of(adapted("lora on llama", torch.bfloat16)).size > WEAK


@formats
def test_a_loss_that_is_not_an_examples_own_is_refused(dtype: torch.dtype) -> None:
    def coupled(model: nn.Module, batch: Rows) -> Tensor:
        own = squares(model, batch)
        return own + WEAK * own.mean().detach()

    with pytest.raises(PrivacyRefusal, match=r"loss of probe example .* with the others in its batch"):
        choose_engine(Narrow(dtype), coupled, rows())


@formats
def test_an_engine_with_a_wrong_gradient_is_refused(dtype: torch.dtype) -> None:
    model = Narrow(dtype)
    model.inner = SquaredLayerNorm()
    with pytest.raises(PrivacyRefusal, match=r"gradient of 'inner\.weight' for example 0 is off by"):
        probe(model, squares, rows(), "bookkeeping")
    assert choose_engine(model, squares, rows()) == "hooks"


CHOSEN = {"lora on llama": "bookkeeping", "norms of gpt2": "bookkeeping", "scales": "slot"}  # as in float32


@pytest.mark.parametrize("case", CHOSEN)
def test_adapters_pass_in_bfloat16_with_the_engine_of_float32_and_stay_float32(case: str) -> None:
    model = adapted(case, torch.bfloat16)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    assert choose_engine(model, TASK.losses, ragged()) == CHOSEN[case]


def test_experts_go_to_the_loop_where_no_record_has_others() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MixtralConfig(**sizes, vocab_size=97, num_attention_heads=4, num_key_value_heads=4)
        model = MixtralForCausalLM(config).eval().requires_grad_(False).to(torch.bfloat16)
    spec = AdapterSpec("ffa_lora", rank=2, targets=("q_proj",), slots=("model.layers.0", "model.layers.1"))
    model = attach(model, spec)
    assert choose_engine(model, TASK.losses, ragged(3)) == "loop"
    with pytest.raises(PrivacyRefusal, match="multiplies the tokens of one expert together"):
        probe(model, TASK.losses, ragged(3), "bookkeeping")


class Restless(torch.autograd.Function):
    """The identity, with noise in the last digits of the gradient, as sums without a fixed order make on a GPU."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * (1 + 2**-9 * torch.randn(gradients[0].shape)).to(gradients[0].dtype)


def test_a_device_whose_sums_have_no_fixed_order_passes() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert choose_engine(Narrow(torch.bfloat16, Restless.apply), squares, rows()) in ENGINES


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_the_tolerances_follow_from_the_format_by_the_stated_rule(dtype: torch.dtype, unit: float) -> None:
    tolerances = Tolerances.of(Narrow(dtype))  # 4 modules with weights
    assert tolerances.size == pytest.approx(2 * unit * 2)
    assert tolerances.module == pytest.approx(8 * unit)
    assert tolerances.company == 1e-4
    assert Tolerances.of(Narrow(torch.float32)) == Tolerances(1e-4, 1e-4, 1e-4)
