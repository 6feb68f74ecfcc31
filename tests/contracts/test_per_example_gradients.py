"""Every adapter method: the engine's per-example gradients against batches of one, and those against torch.func."""

from typing import Any

import pytest
import torch
from torch.func import functional_call, grad
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adapter.methods import METHODS, attach
from adapter.spec import AdapterSpec
from errors import UnsupportedModel
from privacy.batches import trainable
from privacy.engines import ENGINES
from privacy.probe import choose_engine
from task.causal_lm import CausalLM
from task.examples import Examples

TASK = CausalLM()


def llama() -> tuple[Any, tuple[str, ...]]:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    )
    return LlamaForCausalLM(config), ("model.layers.0", "model.layers.3")


def gpt2() -> tuple[Any, tuple[str, ...]]:
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=32)
    return GPT2LMHeadModel(config), ("transformer.h.0", "transformer.h.3")


FAMILIES = {"llama": llama, "gpt2": gpt2}


def adapted(family: str, method: str) -> Any:
    torch.manual_seed(0)
    model, slots = FAMILIES[family]()
    model.eval().requires_grad_(False)
    try:
        model = attach(model, AdapterSpec(method=method, slots=slots))
    except UnsupportedModel as refusal:
        pytest.skip(f"{method} is refused on {family}: {refusal}")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def examples() -> Examples:
    ids = torch.randint(0, 97, (4, 10), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0  # a short record among full ones
    return Examples(ids, mask)


def by_function(model: Any, batch: Examples) -> list[torch.Tensor]:
    """Returns per-example gradients by torch.func.grad of a functional call, one example at a time, in float64."""
    model = model.double().eval()
    names = list(trainable(model))
    values = {name: dict(model.named_parameters())[name].detach() for name in names}

    class Fixed(torch.nn.Module):
        def __init__(self, weights: dict[str, torch.Tensor]) -> None:
            super().__init__()
            self.weights = weights

        def forward(self, **inputs: Any) -> Any:
            return functional_call(model, self.weights, (), inputs)

    rows = [
        grad(lambda weights, i=i: TASK.losses(Fixed(weights), batch.select([i])).sum())(values)
        for i in range(len(batch))
    ]
    return [torch.stack([row[name] for row in rows]) for name in names]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_per_example(family: str, method: str) -> None:
    model, batch = adapted(family, method), examples()
    chosen = choose_engine(model, TASK.losses, batch)
    expected: list[torch.Tensor] = []
    for engine in dict.fromkeys(("loop", chosen)):
        with ENGINES[engine](model) as opened:
            rows = opened.per_example(TASK.losses, batch)
            found = [parameter.grad_sample.clone() for parameter in trainable(model).values()]
        assert rows.kept == (0, 1, 2, 3)
        expected = expected or by_function(adapted(family, method), batch)
        scale = torch.cat([e.flatten(1) for e in expected], 1).norm(dim=1)
        error = torch.cat([(f - e).flatten(1) for f, e in zip(found, expected, strict=True)], 1).norm(dim=1)
        assert float((error / scale).max()) < 2e-5, engine
