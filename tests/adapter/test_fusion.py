"""AdapterFusion: the attention over frozen adapters against the paper's formula in loops."""

import pytest
import torch
from torch.nn import functional

from offsite.adapter.auxiliary import AuxiliaryTensors
from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach, dummy_tensors
from offsite.errors import MalformedMessage
from tests.families import TOWERS, logits, spec_for, tiny

WIDTH = 32


def spec_of(family, adapters=3, rank=4):
    return spec_for("fusion", family, rank=rank, options=(("adapters", adapters),))


def fused(family="llama", adapters=3, rank=4, seed=0):
    spec = spec_of(family, adapters, rank)
    auxiliary = dummy_tensors(tiny(family), spec)
    model = attach(tiny(family), spec, auxiliary)
    layout = Layout.of(model)
    draw = torch.Generator().manual_seed(seed)
    layout.write(model, layout.read(model) + 0.2 * torch.randn(layout.size, generator=draw).numpy())
    return model, auxiliary


def updates_of(auxiliary: AuxiliaryTensors, slot: str, hidden: torch.Tensor, count: int) -> list[torch.Tensor]:
    found = []
    for number in range(count):
        down, low, up, high = (
            auxiliary[f"{slot}.frozen_{number}.{part}"] for part in ("down.weight", "down.bias", "up.weight", "up.bias")
        )
        found.append(functional.gelu(hidden @ down.T + low) @ up.T + high)
    return found


def by_the_paper(
    auxiliary: AuxiliaryTensors, slot: str, parts: dict[str, torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    """s = softmax over n of (h Q) . (z_n K), z'_n = z_n V, output = sum of s_n z'_n, for one position at a time.

    z_n = h + update n is the output of adapter n. K and V read all of z_n; our code leaves out parts without effect.
    """
    flat, rows = hidden.reshape(-1, hidden.shape[-1]).double(), []
    values = {name: tensor.double() for name, tensor in auxiliary.items()}
    for h in flat:
        outputs = [h + update for update in updates_of(values, slot, h, 3)]
        query = parts["query.weight"].double() @ h + parts["query.bias"].double()
        scores = torch.stack([query @ (parts["key.weight"].double() @ z) for z in outputs])
        weights = scores.exp() / scores.exp().sum()
        rows.append(sum(w * (parts["value.weight"].double() @ z) for w, z in zip(weights, outputs, strict=True)))
    return torch.stack(rows).reshape(hidden.shape)


@pytest.mark.parametrize("rank", [1, 4, WIDTH])
def test_it_is_the_papers_attention(rank):
    model, auxiliary = fused(rank=rank)
    hidden = 2 * torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3))
    for slot in spec_of("llama").slots:
        child = model.get_submodule(f"{slot}.offsite_fusion")
        with torch.no_grad():
            expected = by_the_paper(auxiliary, slot, dict(child.named_parameters()), hidden)
            found = child(hidden)
        assert found.shape == hidden.shape
        assert float((found - expected).norm() / expected.norm()) < 1e-6
        weights = child.key(torch.stack(updates_of(auxiliary, slot, hidden, 3), -2)) @ child.query(hidden)[..., None]
        assert weights.softmax(-2).std() > 0.01  # equal weights would test nothing


@pytest.mark.parametrize("family", TOWERS)
def test_at_its_start_the_value_is_the_identity_and_zero_adapters_change_nothing(family):
    spec = spec_of(family)
    auxiliary = {name: torch.zeros_like(tensor) for name, tensor in dummy_tensors(tiny(family), spec).items()}
    model = attach(tiny(family), spec, auxiliary)
    assert torch.allclose(logits(model, family), logits(tiny(family), family), atol=1e-6)
    values = [p for name, p in model.named_parameters() if name.endswith("fusion.value.weight")]
    assert len(values) == 2
    assert all(torch.equal(value, torch.eye(WIDTH)) for value in values)


def test_query_and_key_start_small_and_from_the_seed():
    spec = spec_for("fusion", "llama", rank=WIDTH, seed=4)
    models = [attach(tiny("llama"), spec, dummy_tensors(tiny("llama"), spec)) for _ in range(2)]
    drawn = {n: p for n, p in models[0].named_parameters() if n.endswith(("query.weight", "key.weight"))}
    assert len(drawn) == 4
    for name, parameter in drawn.items():
        assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert torch.equal(parameter, dict(models[1].named_parameters())[name])


def test_adapters_of_several_ranks_are_mixed_and_one_of_two_ranks_is_refused():
    spec = spec_of("llama", adapters=2)
    auxiliary = dict(dummy_tensors(tiny("llama"), spec))
    for slot in spec.slots:
        first = f"{slot}.frozen_0"
        auxiliary |= {f"{first}.down.weight": torch.ones(7, WIDTH), f"{first}.down.bias": torch.ones(7)}
        auxiliary |= {f"{first}.up.weight": torch.full((WIDTH, 7), 0.01)}
    assert torch.isfinite(logits(attach(tiny("llama"), spec, auxiliary), "llama")).all()
    auxiliary[f"{spec.slots[1]}.frozen_0.down.bias"] = torch.ones(6)
    with pytest.raises(MalformedMessage, match=r"frozen_0.down.bias.*\(6,\), must be torch.float32 \(7,\)"):
        attach(tiny("llama"), spec, auxiliary)


def test_examples_and_positions_do_not_touch_each_other():
    model, _ = fused()
    child = model.get_submodule("model.layers.0.offsite_fusion")
    hidden = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        whole, alone = (
            child(hidden),
            torch.stack([child(row[None, at : at + 1])[0, 0] for row in hidden for at in range(5)]),
        )
    assert torch.allclose(whole.reshape(-1, WIDTH), alone, atol=1e-5)
