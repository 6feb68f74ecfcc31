"""adapter.layout: one vector in one order."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from offsite.adapter.layout import Layout
from offsite.errors import DigestMismatch, MalformedMessage, RangeError, UnsupportedModel


def model():
    torch.manual_seed(0)
    made = nn.ModuleDict({"b": nn.Linear(2, 3), "a": nn.Linear(3, 1, bias=False), "frozen": nn.Linear(4, 4)})
    made["frozen"].requires_grad_(False)
    return made


def test_only_what_is_trainable_is_in_it_sorted_by_name():
    layout = Layout.of(model())
    assert layout.names == ("a.weight", "b.bias", "b.weight")
    assert layout.shapes == ((1, 3), (3,), (3, 2))
    assert layout.size == 12


def test_the_vector_is_the_parameters_in_that_order():
    made = model()
    by_hand = np.concatenate(
        [made["a"].weight.detach().flatten(), made["b"].bias.detach(), made["b"].weight.detach().flatten()]
    )
    vector = Layout.of(made).read(made)
    assert vector.dtype == np.float32
    assert np.array_equal(vector, by_hand)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_what_is_written_is_read_and_named(dtype):
    made = model()
    layout = Layout.of(made)
    vector = np.arange(12).astype(dtype)
    vector.flags.writeable = False
    layout.write(made, vector)
    assert np.array_equal(layout.read(made), vector)
    assert made["b"].bias.tolist() == [3.0, 4.0, 5.0]
    named = layout.named(vector)
    assert [(name, array.shape) for name, array in named.items()] == list(zip(layout.names, layout.shapes, strict=True))
    assert all(array.dtype == np.float32 for array in named.values())


@pytest.mark.parametrize("vector", [np.zeros(11), np.zeros(13), np.zeros((12, 1)), np.zeros((3, 4)), np.zeros(0)])
def test_another_length_is_refused(vector):
    made = model()
    before = Layout.of(made).read(made)
    with pytest.raises(RangeError, match=r"must be \(12,\)"):
        Layout.of(made).write(made, vector)
    assert np.array_equal(Layout.of(made).read(made), before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_a_value_that_is_not_finite_in_float32_is_refused_before_anything_is_written(bad):
    made = model()
    before = Layout.of(made).read(made)
    vector = np.zeros(12)
    vector[7] = bad
    with pytest.raises(RangeError, match="non-finite values=1"):
        Layout.of(made).write(made, vector)
    assert np.array_equal(Layout.of(made).read(made), before)


def test_another_models_layout_is_refused():
    layout, other = Layout.of(model()), model()
    other["a"].requires_grad_(False)
    with pytest.raises(DigestMismatch):
        layout.read(other)
    with pytest.raises(DigestMismatch):
        layout.write(other, np.zeros(12))


def test_a_frozen_model_has_no_layout():
    with pytest.raises(UnsupportedModel, match="trainable parameters=0"):
        Layout.of(model().requires_grad_(False))


def test_the_digest_tells_every_change_apart():
    layouts = [
        Layout(("a", "b"), ((2, 3), (1,))),
        Layout(("a", "b"), ((3, 2), (1,))),
        Layout(("a", "b"), ((6,), (1,))),
        Layout(("a", "c"), ((2, 3), (1,))),
        Layout(("ab",), ((2, 3),)),
        Layout(("a", "b"), ((2,), (3, 1))),
        Layout(("a", "b"), ((), (2,))),
    ]
    assert len({layout.digest() for layout in layouts}) == len(layouts)
    assert all(len(layout.digest()) == 32 for layout in layouts)
    assert Layout.of(model()).digest() == Layout.of(model()).digest()


def test_a_layout_comes_back_from_json():
    layout = Layout.of(model())
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize(
    "values",
    [
        {"names": ["a"]},
        {"names": ["a"], "shapes": [[1]], "more": 1},
        {"names": "a", "shapes": [[1]]},
        {"names": ["a"], "shapes": [["1"]]},
        {"names": ["a"], "shapes": [[1.5]]},
        {"names": ["a"], "shapes": [1]},
        {"names": ["a"], "shapes": [[0]]},
        {"names": ["a"], "shapes": [[-1]]},
        {"names": ["a"], "shapes": [[True]]},
        {"names": ["b", "a"], "shapes": [[1], [1]]},
        {"names": ["a", "a"], "shapes": [[1], [1]]},
        {"names": ["a", "b"], "shapes": [[1]]},
        {"names": [], "shapes": []},
    ],
)
def test_malformed_json_is_refused(values):
    with pytest.raises(MalformedMessage):
        Layout.from_dict(values)
