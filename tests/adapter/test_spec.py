"""adapter.spec: refusals, and the JSON form."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offsite.adapter.spec import AdapterSpec
from offsite.errors import ConfigError

OPTION = st.one_of(st.integers(-(2**53), 2**53), st.floats(-1e9, 1e9), st.booleans(), st.just("road_2"))
OPTIONS = st.dictionaries(st.from_regex(r"[a-z][a-z_0-9]{0,9}", fullmatch=True), OPTION, max_size=5)
NAMES = st.lists(st.text(min_size=1, max_size=8), max_size=4, unique=True).map(tuple)


@given(
    rank=st.integers(1, 512),
    alpha=st.floats(min_value=1e-3, max_value=1e6),
    targets=NAMES,
    slots=NAMES,
    seed=st.integers(0, 2**63 - 1),
    options=OPTIONS.map(lambda values: tuple(sorted(values.items()))),
)
def test_a_spec_comes_back_from_json(rank, alpha, targets, slots, seed, options):
    spec = AdapterSpec("lora", rank, alpha, targets, slots, seed, options)
    assert AdapterSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0.0}, r"alpha=0\.0"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"alpha": math.inf}, "alpha=inf"),
        ({"alpha": 10**400}, r"alpha=1000.* must be from 1e-09 to 1e\+09"),
        ({"alpha": 9e-10}, "alpha=9e-10"),
        ({"rank": 10**400}, "rank=1000.* must be from 1 to 65536"),
        ({"options": (("a", 10**400),)}, "a=1000.* must be within"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed="),
        ({"slots": ("a", "a")}, "twice"),
        ({"targets": ("",)}, "non-empty"),
        ({"slots": "model.layers.0"}, "tuple"),
        ({"options": (("b", 1), ("a", 1))}, "sorted by name"),
        ({"options": (("a", 1), ("a", 2))}, "sorted by name"),
        ({"options": (("os.path", 1),)}, "letters, digits"),
        ({"options": (("a" * 65, 1),)}, "letters, digits"),
        ({"options": (("a", (1, 2)),)}, "a=tuple must be a number"),
        ({"options": (("a", None),)}, "a=NoneType must be a number"),
        ({"options": (("a", "../../passwd"),)}, "no option takes a path"),
        ({"options": (("a", "torch.load"),)}, "no option takes a path"),
        ({"options": (("a", math.inf),)}, "a=inf must be within"),
        ({"options": tuple((f"a{index:02}", 1) for index in range(17))}, "options=17"),
    ],
)
def test_values_no_method_could_use_are_refused(change, reason):
    with pytest.raises(ConfigError, match=reason):
        AdapterSpec(**change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ranc": 2}, "did you mean rank"),
        ({"rank": "2"}, "must be of type int"),
        ({"rank": True}, "must be of type int"),
        ({"alpha": "4"}, "must be of type int or float"),
        ({"slots": "model.layers.0"}, "must be of type list"),
        ({"slots": [1]}, "non-empty names"),
        ({"options": [["a", 1]]}, "must be of type dict"),
        ({"options": {"a": {"b": 1}}}, "a=dict must be a number"),
    ],
)
def test_json_of_another_form_is_refused(change, reason):
    with pytest.raises(ConfigError, match=reason):
        AdapterSpec.from_dict(AdapterSpec().to_dict() | change)


def test_a_missing_key_is_refused():
    values = AdapterSpec().to_dict()
    values.pop("seed")
    with pytest.raises(ConfigError, match="'seed' is missing"):
        AdapterSpec.from_dict(values)
