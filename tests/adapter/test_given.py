"""Auxiliary tensors: exactly the tensors that a spec requires are taken, and they are never trained."""

import pytest
import torch

from offsite.adapter.auxiliary import MAX_LENGTH, TensorSpec, check_auxiliary, dummy_tensors_for, positions
from offsite.adapter.layout import Layout
from offsite.adapter.methods import METHODS, attach, dummy_tensors, frozen_count, needs_public_data, required_tensors
from offsite.adapter.spec import AdapterSpec
from offsite.errors import ConfigError, MalformedMessage
from offsite.privacy.probe import choose_engine
from tests.contracts.test_per_example_gradients import brute_force, by_engine, examples, losses
from tests.families import TOWERS, attach_any, logits, loss, spec_for, tiny

FISHER = (("by", "fisher"), ("density", 0.05))
SPECS = [
    ("madx", ()),
    ("fusion", ()),
    ("fusion", (("adapters", 3),)),
    ("masked", FISHER),
    ("masked", (*FISHER, ("head", True))),
]
VALUES, PLACES = TensorSpec(("r", 3)), positions(3, 10)


def spec_of(method, family, options):
    return spec_for(method, family, options=options)


@pytest.mark.parametrize(
    ("spec", "bad", "reason"),
    [
        (VALUES, torch.zeros(2, 4), r"must be torch.float32 \('r', 3\)|must be torch.float32 \(2, 3\)"),
        (VALUES, torch.zeros(3), "must be torch.float32"),
        (VALUES, torch.zeros(0, 3), "must be torch.float32"),
        (VALUES, torch.zeros(MAX_LENGTH + 1, 3), "must be torch.float32"),
        (VALUES, torch.zeros(2, 3, dtype=torch.float64), "is torch.float64"),
        (VALUES, torch.zeros(2, 3, dtype=torch.bfloat16), "is torch.bfloat16"),
        (VALUES, torch.full((2, 3), float("nan")), "NaN or Inf"),
        (VALUES, torch.full((2, 3), -float("inf")), "NaN or Inf"),
        (PLACES, torch.tensor([0, 1, 2]), "is torch.int64"),
        (PLACES, torch.tensor([0, 1], dtype=torch.int32), "must be torch.int32"),
        (PLACES, torch.tensor([0, 1, 1], dtype=torch.int32), "ascending positions in 0..9"),
        (PLACES, torch.tensor([2, 1, 5], dtype=torch.int32), "ascending positions"),
        (PLACES, torch.tensor([-1, 1, 5], dtype=torch.int32), "ascending positions"),
        (PLACES, torch.tensor([0, 1, 10], dtype=torch.int32), "ascending positions"),
        (PLACES, torch.tensor([2**31 - 1, -(2**31), 5], dtype=torch.int32), "ascending positions"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(spec, bad, reason):
    with pytest.raises(MalformedMessage, match=reason):
        check_auxiliary({"t": spec}, {"t": bad}, hint="ask")


def test_a_missing_and_a_needless_tensor_are_refused_by_name():
    with pytest.raises(MalformedMessage, match="auxiliary tensor='t' is missing: ask"):
        check_auxiliary({"t": VALUES}, {}, hint="ask")
    with pytest.raises(MalformedMessage, match="auxiliary tensor='u' has no use here: ask"):
        check_auxiliary({"t": VALUES}, {"t": torch.zeros(2, 3), "u": torch.zeros(1)}, hint="ask")
    with pytest.raises(MalformedMessage, match="method 'lora' takes none"):
        attach(tiny("llama"), spec_for("lora", "llama"), {"t": torch.zeros(1)})


def test_a_length_that_is_chosen_is_the_same_wherever_its_word_stands():
    both = {"a": TensorSpec(("r",)), "b": TensorSpec((4, "r"))}
    check_auxiliary(both, {"a": torch.zeros(2), "b": torch.zeros(4, 2)}, hint="ask")
    with pytest.raises(MalformedMessage, match=r"auxiliary tensor='b' .*must be torch.float32 \(4, 2\)"):
        check_auxiliary(both, {"a": torch.zeros(2), "b": torch.zeros(4, 3)}, hint="ask")


def test_positions_of_a_matrix_beyond_32_bits_are_wider():
    assert positions(1, 2**31 - 1).dtype == torch.int32
    assert positions(1, 2**31).dtype == torch.int64


def test_dummy_tensors_fit_their_specs_and_are_the_same_every_time():
    state = torch.get_rng_state()
    found = [dummy_tensors_for({"t": VALUES, "p": PLACES}, free=5, seed=3) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    check_auxiliary({"t": VALUES, "p": PLACES}, found[0], hint="")
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert found[0]["t"].shape == (5, 3)


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize(("method", "options"), SPECS)
def test_no_auxiliary_tensor_is_trained_moved_or_stored(method, options, family):
    spec = spec_of(method, family, options)
    base = tiny(family)
    auxiliary = dummy_tensors(base, spec)
    assert auxiliary
    before = {name: tensor.clone() for name, tensor in auxiliary.items()}
    model = attach(base, spec, auxiliary)
    state = set(model.state_dict())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(Layout.of(model).names)
    frozen = {name for name, _ in model.named_buffers() if ".offsite_frozen" in name or ".frozen_" in name}
    frozen |= {name for name, _ in model.named_buffers() if name.endswith(".places")}
    assert len(frozen) == len(auxiliary)
    assert not frozen & (state | trained)
    found = [p for p in model.parameters() if p.requires_grad]
    loss(model, family).backward()
    torch.optim.SGD(found, lr=1.0).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in auxiliary.items())


@pytest.mark.parametrize("method", ["madx", "fusion"])
def test_each_tensor_is_needed(method):
    spec = spec_for(method, "llama")
    auxiliary = dummy_tensors(tiny("llama"), spec)
    for name in auxiliary:
        with pytest.raises(MalformedMessage, match="is missing"):
            attach(tiny("llama"), spec, {other: tensor for other, tensor in auxiliary.items() if other != name})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_auxiliary_mask_has_its_entries_trained_and_engines_agree(family):
    """The mask by Fisher information has the start, places and gradients that contract tests check by magnitude."""
    spec = spec_of("masked", family, FISHER)
    base, auxiliary = tiny(family), dummy_tensors(tiny(family), spec)
    plain = logits(base, family)
    weights = {
        name.removesuffix(".places"): base.get_submodule(name.removesuffix(".places")).weight for name in auxiliary
    }
    model = attach(base, spec, auxiliary)
    assert torch.equal(logits(model, family), plain)
    layout = Layout.of(model)
    layout.write(model, layout.read(model) + 0.1)
    by_hand = tiny(family)
    with torch.no_grad():
        for path, weight in weights.items():
            assert len(auxiliary[f"{path}.places"]) == round(0.05 * weight.numel())
            by_hand.get_submodule(path).weight.view(-1)[auxiliary[f"{path}.places"].long()] += 0.1
    assert torch.allclose(logits(model, family), logits(by_hand, family), atol=1e-5)
    model, batch = model.double(), examples(family, torch.float64)
    right = brute_force(model, batch)
    found = by_engine(model, batch, choose_engine(model, losses, batch))
    assert float((found - right).norm() / right.norm()) < 1e-6


def test_the_table_says_what_a_spec_needs():
    assert {name for name, method in METHODS.items() if method.auxiliary} == {"masked", "madx", "fusion"}
    assert [frozen_count(AdapterSpec(name)) for name in ("lora", "masked", "madx", "fusion")] == [0, 0, 1, 2]
    assert frozen_count(AdapterSpec("fusion", options=(("adapters", 5), ("head", True)))) == 5
    assert needs_public_data(AdapterSpec("masked", options=(("by", "fisher"), ("head", True))))
    assert not needs_public_data(AdapterSpec("masked"))
    assert required_tensors(tiny("llama"), spec_for("masked", "llama")) == {}
    with pytest.raises(ConfigError, match=r"needs a value in 2\.\.16"):
        frozen_count(AdapterSpec("fusion", options=(("adapters", 17),)))


def test_a_deep_block_of_any_tower_takes_them():
    assert attach_any(tiny("gpt2"), spec_for("madx", "gpt2", slots=("transformer.h.2",))) is not None
