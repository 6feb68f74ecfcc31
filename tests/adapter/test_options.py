"""The options of methods: their values, their fit to widths, and refusals before anything is built."""

import math

import pytest
import torch
from torch import nn

from offsite.adapter.layout import Layout
from offsite.adapter.methods import METHODS, attach, known
from offsite.adapter.methods.peft_tuner_table import TUNERS
from offsite.adapter.options import Option, resolve
from offsite.adapter.spec import AdapterSpec
from offsite.errors import ConfigError, OffsiteError, UnsupportedModel
from tests.families import TOWERS, logits, spec_for, tiny


def with_options(method, family="llama", **options):
    return spec_for(method, family, options=tuple(sorted(options.items())))


@pytest.mark.parametrize("method", METHODS)
def test_every_default_is_in_its_own_range_and_every_end_is_taken(method):
    for option in METHODS[method].options:
        assert option.read(option.default, method) == option.default
        for end in option.choices or ((option.low, option.high) if type(option.default) is not bool else ()):
            assert option.read(type(option.default)(end), method) == end
    known(AdapterSpec(method, options=(("head", True),)))
    with pytest.raises(ConfigError, match="option='nonsense' is not an option of method"):
        known(AdapterSpec(method, options=(("nonsense", 1),)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"n_frequenzy": 8}, "did you mean n_frequency"),
        ({"n_frequency": 0}, "needs a value in 1.."),
        ({"n_frequency": 2**22 + 1}, "needs a value in 1.."),
        ({"n_frequency": 8.0}, "of type int"),
        ({"n_frequency": True}, "of type int"),
        ({"scaling": "much"}, "of type float"),
        ({"head": 1}, "of type bool"),
    ],
)
def test_a_wrong_option_is_refused_before_any_model_is_touched(options, reason):
    with pytest.raises(ConfigError, match=reason):
        known(with_options("fourierft", **options))


def test_a_word_is_one_of_the_choices():
    with pytest.raises(ConfigError, match="takes one of road_1, road_2, road_4"):
        known(with_options("road", variant="road_3"))


def test_a_whole_number_is_a_float_where_one_is_meant():
    values = resolve((("scaling", 2),), (Option("scaling", 1.0, 0.5, 3.0),), "m")
    assert values == {"scaling": 2.0}
    assert type(values["scaling"]) is float


def test_an_option_has_its_effect():
    few, many = (Layout.of(attach(tiny("llama"), with_options("fourierft", n_frequency=n))).size for n in (5, 50))
    assert (few, many) == (4 * 5, 4 * 50)
    layer = attach(tiny("llama"), with_options("c3a", block_size=4)).base_model.model.model.layers[0].self_attn
    assert layer.q_proj.c3a_kernel["default"].shape == (8, 8, 4)
    assert layer.v_proj.c3a_kernel["default"].shape == (4, 8, 4)


@pytest.mark.parametrize(
    ("method", "option", "asked"),
    [
        ("c3a", "block_size", 5),
        ("oft", "oft_block_size", 6),
        ("road", "group_size", 64),
        ("vblora", "vector_length", 7),
    ],
)
def test_a_value_that_does_not_fit_the_targets_is_refused_and_never_repaired(method, option, asked):
    with pytest.raises(
        ConfigError, match=rf"option {option}={asked} does not fit the targets \(divides.*; set it to \d+"
    ):
        attach(tiny("llama"), with_options(method, **{option: asked}))


def test_more_coefficients_than_entries_are_refused():
    with pytest.raises(ConfigError, match=r"n_frequency=600 does not fit the targets \(entries\); set it to 512"):
        attach(tiny("llama"), with_options("waveft", n_frequency=600))


def test_a_default_is_the_largest_that_fits():
    """Checked by brute force over all values up to the default."""
    widths = [(32, 32), (32, 16)]  # of q_proj and v_proj
    ends = {"c3a": (0, 1), "oft": (0,), "road": (1,), "vblora": (0, 1)}
    tuners = {tuner.name: tuner for tuner in TUNERS}
    for method, which in ends.items():
        name = tuners[method].fitted[0][0]
        top = next(option.default for option in tuners[method].options if option.name == name)
        fitting = [v for v in range(1, top + 1) if all(size[end] % v == 0 for size in widths for end in which)]
        config = attach(tiny("llama"), spec_for(method, "llama")).peft_config["default"]
        assert getattr(config, name) == max(fitting)


def test_what_peft_itself_refuses_is_an_error_of_ours():
    odd = nn.Sequential(nn.Sequential(nn.Linear(6, 9)))
    with pytest.raises(OffsiteError, match="peft refuses"):
        attach(odd, AdapterSpec("road", slots=("0",), targets=("0",)))


@pytest.mark.parametrize(("method", "rank"), [("hra", 3), ("gralora", 5)])
def test_a_rank_that_the_method_cannot_have_is_refused(method, rank):
    with pytest.raises(ConfigError, match=f"rank={rank} must be a multiple of 2 for method {method!r}"):
        attach(tiny("llama"), spec_for(method, "llama", rank=rank))


@pytest.mark.parametrize("method", ["vera", "hira", "fed_sb"])
def test_a_rank_above_a_width_is_refused(method):
    with pytest.raises(ConfigError, match=r"rank=17 must be at most 16, the width"):
        attach(tiny("llama"), spec_for(method, "llama", rank=17))


@pytest.mark.parametrize("seed", [2**32 + 5, 2**63 - 1])
def test_seeds_of_any_size_are_taken(seed):
    for method in ("unilora", "shira", "vera", "masked", "fed_sb"):
        model = attach(tiny("llama"), spec_for(method, "llama", seed=seed))
        assert torch.isfinite(logits(model, "llama")).all()


@pytest.mark.parametrize("family", TOWERS)
def test_density_is_the_share_of_entries(family):
    for density in (0.01, 0.5, 1.0):
        base = tiny(family)
        model = attach(base, with_options("masked", family, density=density))
        expected = 0
        for module in model.modules():
            if hasattr(module, "offsite_update"):
                expected += max(1, round(density * math.prod(module.weight.shape)))
        assert Layout.of(model).size == expected


def test_no_option_carries_a_name_of_code_or_a_path_into_peft():
    """Every option that is a word has a table of choices."""
    for method in METHODS.values():
        for option in method.options:
            assert type(option.default) in (int, float, bool, str)
            assert not isinstance(option.default, str) or option.default in option.choices
    with pytest.raises(UnsupportedModel):
        known(AdapterSpec("pissa"))
