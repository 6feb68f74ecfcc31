"""A rehearsal is an ordinary training, a correction is exact where it can be, and nothing leaves a trace."""

import copy

import numpy as np
import pytest
import torch
import transformers as hf
from torch.nn import functional

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.evaluation.rehearse import Lesson, Text, reference, rehearse
from offsite.emulator.runtime.correction import repaired
from offsite.emulator.runtime.plug_in import take
from offsite.errors import RangeError
from offsite.task.examples import Examples
from offsite.task.tasks import TASKS
from tests.emulator.conftest import CAUSAL, _causal

TASK = TASKS["causal_lm"]


def examples(count, seed):
    """Sequences that count upwards by two steps: there is something to learn."""
    start = torch.randint(0, 61, (count, 1), generator=torch.Generator().manual_seed(seed))
    ids = (start + torch.tensor([0, 1, 3, 4, 6, 7, 9, 10, 12, 13])) % 61
    return PublicExamples(TASK, Examples(ids, torch.ones_like(ids)), batch=4)


TEXT = Text(train=examples(32, 1), test=examples(16, 2), attack=examples(32, 3), length=10)


@pytest.fixture
def full():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return _causal(hf.LlamaConfig(**CAUSAL, use_cache=False)).eval().requires_grad_(False)


@pytest.fixture
def lesson():
    slots = ("model.layers.0", "model.layers.5")
    return Lesson(AdapterSpec("lora", rank=4, alpha=8.0, slots=slots), steps=12, batch=4, learning_rate=2e-2)


def noisy(model, size):
    """An emulator that is the model with noise in the middle."""
    emulator = copy.deepcopy(model)
    for layer in emulator.model.layers[1:5]:
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=size)
    return emulator


def test_the_model_itself_transfers_all_and_gives_all_away(full, lesson):
    found = rehearse(full, copy.deepcopy(full), lesson, TEXT, reference(full, lesson, TEXT))
    assert found.gain > 0.05
    assert found.transfer == pytest.approx(1, abs=1e-4)
    assert found.leak == pytest.approx(1, abs=1e-4)


def test_a_noisy_one_transfers_less_and_relearning_gives_more_away(full, lesson):
    known = reference(full, lesson, TEXT)
    found = rehearse(full, noisy(full, 0.2), lesson, TEXT, known, relearn=(80, 1200))
    assert found.transfer < 0.95
    assert found.leak < 1
    assert found.relearned_leak(1200) > max(found.relearned_leak(80), found.leak)
    assert found.worst_leak == found.relearned_leak(1200)
    assert found.to_dict()["relearned_leak"] == {n: found.relearned_leak(n) for n in (80, 1200)}


def test_a_rehearsal_leaves_no_trace(full, lesson):
    emulator = noisy(full, 0.1)
    before = [copy.deepcopy(model.state_dict()) for model in (full, emulator)]
    rehearse(full, emulator, lesson, TEXT, reference(full, lesson, TEXT), relearn=(80,))
    for model, state in zip((full, emulator), before, strict=True):
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_training_is_plain_adam(full, lesson):
    known = reference(full, lesson, TEXT)
    model = attach(copy.deepcopy(full), lesson.spec)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
    generator, rows = torch.Generator().manual_seed(0), []
    while len(rows) < 48:
        rows += torch.randperm(32, generator=generator).tolist()
    for step in range(12):
        ids = TEXT.train.examples.input_ids[rows[4 * step : 4 * step + 4]]
        logits = model(input_ids=ids).logits[:, :-1]
        optimizer.zero_grad()
        functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    assert TEXT.test.loss(model) == pytest.approx(known.slot_tuned, abs=1e-4)


def test_a_text_on_which_nothing_is_gained_is_refused(full, lesson):
    known = reference(full, lesson, TEXT)
    with pytest.raises(RangeError, match="the adapter gains nothing"):
        rehearse(full, full, lesson, TEXT, type(known)(known.slot_tuned, known.zero_shot))


@pytest.mark.parametrize("method", ["lora", "ffa_lora"])
def test_a_repaired_adapter_acts_in_the_full_model_as_it_did_in_the_emulator(full, method):
    """Compares on inputs in the span of A: an adapter sees no other part of its inputs."""
    paths = tuple(f"model.layers.{i}" for i in range(6))
    spec = AdapterSpec(method, rank=4, alpha=6.0, slots=paths)
    emulator = noisy(full, 1e-3)
    tuned = attach(copy.deepcopy(full), spec)
    layout = Layout.of(tuned)
    rng = np.random.default_rng(0)
    layout.write(tuned, layout.read(tuned) + rng.normal(size=layout.size, scale=0.5))
    other = attach(copy.deepcopy(emulator), spec)
    layout.write(other, layout.read(tuned))
    vector = repaired(tuned, emulator, 1.0)
    layout.write(tuned, vector.numpy())
    path = "base_model.model.model.layers.2.self_attn.q_proj"
    mine, theirs = tuned.get_submodule(path), other.get_submodule(path)
    span = torch.randn(7, 4) @ mine.lora_A["default"].weight
    torch.testing.assert_close(mine(span), theirs(span), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mine.base_layer(span), theirs.base_layer(span), rtol=1e-4, atol=1e-4)


def test_no_strength_is_no_change(full, lesson):
    tuned = attach(copy.deepcopy(full), lesson.spec)
    layout = Layout.of(tuned)
    assert torch.equal(repaired(tuned, noisy(full, 0.1), 0.0), torch.from_numpy(layout.read(tuned)))


@pytest.mark.parametrize(
    ("losses", "scale", "accepted"),
    [
        ({1.0: 2.9, 0.5: 2.0, 0.25: 2.0}, 1.0, True),
        ({1.0: 3.1, 0.5: 2.9, 0.25: 2.0}, 0.5, True),
        ({1.0: 3.1, 0.5: float("nan"), 0.25: 3.0}, 0.25, True),
        ({1.0: 3.1, 0.5: 3.2, 0.25: 3.3}, 1.0, False),
    ],
)
def test_as_much_of_an_update_is_taken_as_does_no_harm(losses, scale, accepted):
    found, loss, verdict = take(3.0, losses.__getitem__)
    assert (found, verdict.accepted) == (scale, accepted)
    assert loss == losses[scale]
    assert ("of the update is taken over" in verdict.reason) == (accepted and scale < 1)
