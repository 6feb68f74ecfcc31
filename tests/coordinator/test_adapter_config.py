"""The adapter's table in a federation file, and its section in the report."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offsite.adapter.methods import known
from offsite.coordinator.config.federation_file import FedConfig, parse_config
from offsite.coordinator.report.model import AdapterFacts
from offsite.coordinator.report.sections import adapter
from offsite.errors import ConfigError, OffsiteError, UnsupportedModel

SITES = [{"name": name, "train": "t", "heldout": "h"} for name in ("ash", "birch", "cedar")]


def parsed(**settings: Any) -> FedConfig:
    content = {"model": {"path": "m"}, "data": {"public": "p"}, "sites": SITES, "adapter": settings}
    return parse_config(content, Path("/"))


def test_options_become_a_sorted_part_of_the_spec() -> None:
    config = parsed(method="fourierft", rank=3, options={"scaling": 2, "n_frequency": 64, "head": True})
    spec = config.adapter.spec(slots=("a", "b"), seed=7)
    assert (spec.method, spec.rank, spec.slots, spec.seed) == ("fourierft", 3, ("a", "b"), 7)
    assert spec.options == (("head", True), ("n_frequency", 64), ("scaling", 2))
    assert config.to_dict()["adapter"]["options"] == {"scaling": 2, "n_frequency": 64, "head": True}
    assert known(spec).name == "fourierft"
    assert parsed().adapter.spec(slots=(), seed=0).options == ()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"options": [1]}, "must be a table"),
        ({"options": {"u": [1]}}, "adapter.options.u=.*must be of type int or float or bool or str"),
        ({"options": {"u": "../x"}}, "no option takes a path"),
        ({"options": {"a b": 1}}, "letters, digits"),
        ({"option": {}}, "did you mean options"),
        ({"rank": 0}, "rank=0 must be from 1 to 65536"),
        ({"alpha": -1.0}, "must be from 1e-09 to 1e\\+09"),
    ],
)
def test_what_no_method_could_use_is_refused_where_it_is_read(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parsed(**settings)


@pytest.mark.parametrize(
    ("settings", "kind", "reason"),
    [
        ({"method": "pissa"}, UnsupportedModel, "is not offered: as a start of lora"),
        ({"method": "lorra"}, OffsiteError, "did you mean lora"),
        ({"method": "lora", "options": {"n_frequency": 1}}, ConfigError, "not an option of method 'lora'"),
    ],
)
def test_what_this_method_cannot_use_is_refused_before_a_model_is_loaded(
    settings: dict[str, Any], kind: type[Exception], reason: str
) -> None:
    with pytest.raises(kind, match=reason):
        known(parsed(**settings).adapter.spec(slots=(), seed=0))


def test_the_report_names_the_options() -> None:
    facts = AdapterFacts("c3a", 2, 4.0, (), ("a",), 5, True, "so", {}, True, "adapter")
    plain, with_options = (dict(adapter(replace(facts, options=more)).rows) for more in ({}, {"block_size": 8}))
    assert with_options.pop("option block_size") == "8"
    assert with_options == plain
