"""Small models with losses, and a slow second implementation of the clipped sum."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from task.examples import Examples
from task.tasks import TASKS


@dataclass(frozen=True)
class Pairs:
    x: torch.Tensor
    y: torch.Tensor

    def __len__(self):
        return len(self.x)

    def select(self, indices):
        rows = torch.as_tensor(indices, dtype=torch.long)
        return Pairs(self.x[rows], self.y[rows])


def squared(model, batch):
    return (model(batch.x) - batch.y).square().mean(1)


@pytest.fixture
def toy():
    """A frozen layer, a trainable norm and a trainable layer, float64, with 12 examples."""
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    model[0].requires_grad_(False)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(12, 3, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 12)[:, None]
    return SimpleNamespace(model=model, batch=Pairs(x, y), losses=squared, pairs=Pairs)


@pytest.fixture
def ragged():
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(1, 97, (4, 10), generator=generator)
    mask = (torch.arange(10) < torch.tensor([10, 6, 8, 4])[:, None]).long()
    return Examples(ids, mask)


@pytest.fixture
def causal():
    return TASKS["causal_lm"].losses


def tiny(family):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if family == "llama":
            config = LlamaConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=97,
                use_cache=False,
            )
            return LlamaForCausalLM(config).eval()
        config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=97, n_positions=32, use_cache=False)
        config.bos_token_id = config.eos_token_id = 0
        return GPT2LMHeadModel(config).eval()


@pytest.fixture
def make():
    return tiny


def gradients(model, losses, batch):
    """Each example's gradient through torch.func, which has no part in either engine; name -> (B, *shape)."""
    parameters = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    class Call:
        def __init__(self, values):
            self.values = values

        def __call__(self, *args, **kwargs):
            return functional_call(model, self.values, args, kwargs)

    rows = [grad(lambda values, i=i: losses(Call(values), batch.select([i]))[0])(parameters) for i in range(len(batch))]
    return {name: torch.stack([row[name] for row in rows]) for name in parameters}


@pytest.fixture
def by_hand():
    return gradients


@pytest.fixture
def clipped_by_hand():
    def clipped(model, losses, batch, bound):
        rows = gradients(model, losses, batch)
        flat = torch.cat([value.flatten(1) for value in rows.values()], 1).double()
        total = torch.zeros(flat.shape[1], dtype=torch.float64)
        for row in flat:
            total += row * min(1.0, bound / float(row.norm()))
        return total

    return clipped
