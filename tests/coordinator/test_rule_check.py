"""An aggregation rule that does not fit the federation file is refused in one line, before anything slow."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from offsite.coordinator.aggregation.compatibility import KEYS, check_rule
from offsite.coordinator.aggregation.rules import AGGREGATORS, INDIVIDUALS, REFUSED
from offsite.coordinator.config.aggregation_table import AggregationConfig, RankConfig, SecaggConfig
from offsite.coordinator.config.data_tables import DataConfig, ModelConfig, SiteConfig
from offsite.coordinator.config.federation_file import FedConfig, read_config
from offsite.coordinator.config.training_tables import AdapterConfig, TrainingConfig
from offsite.errors import ConfigError, DataError, UnknownName

SITES = ("ash", "birch", "cedar", "elm", "fir")
FITS: dict[str, dict[str, Any]] = {
    "fedprox": {"proximal": 0.5, "steps": 4},
    "rolora": {"method": "lora"},
    "nested": {"ranks": (RankConfig(("elm",), 1), RankConfig(("fir",), 2))},
    "olora": {"method": "lora", "penalty": 0.5},
    "krum": {"faulty": 1, "enabled": False, "n_min": 5},
    "trimmed_mean": {"faulty": 1, "enabled": False},
    "median": {"enabled": False},
    "flexlora": {"method": "lora", "enabled": False},
}


def config(rule: str, **changed: Any) -> FedConfig:
    """Returns a federation of five sites with a rule and the keys that the rule needs, with a test's changes."""
    values = FITS.get(rule, {}) | changed
    training = TrainingConfig(
        local_steps=values.pop("steps", 1),
        learning_rate=values.pop("rate", 1.0),
        directions=values.pop("directions", 0),
    )
    adapter = AdapterConfig(method=values.pop("method", "ffa_lora"), rank=4)
    secagg = SecaggConfig(n_min=values.pop("n_min", 3), enabled=values.pop("enabled", True))
    return FedConfig(
        ModelConfig("model"),
        DataConfig("public"),
        tuple(SiteConfig(site, "train", "heldout") for site in SITES),
        training=training,
        adapter=adapter,
        secagg=secagg,
        aggregation=AggregationConfig(rule, **values),
    )


def check(made: FedConfig) -> None:
    check_rule(made, SITES, made.secagg.n_min)


def refused(made: FedConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check(made)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def earlier(tmp_path: Path) -> str:
    rows = np.ones((2, 4), dtype=np.float32)
    save_file({"layer.lora_A.weight": rows}, tmp_path / "adapter_model.safetensors")
    return str(tmp_path)


@pytest.mark.parametrize("rule", AGGREGATORS)
def test_a_rule_with_what_it_needs_is_taken(rule: str, earlier: str) -> None:
    check(config(rule, **({"earlier": (earlier,)} if rule == "olora" else {})))


@pytest.mark.parametrize("rule", [one.name for one in AGGREGATORS.values() if one.needs == INDIVIDUALS])
def test_what_needs_each_update_is_refused_under_secure_aggregation(rule: str) -> None:
    said = refused(config(rule, enabled=True))
    assert f"aggregation.rule={rule!r}" in said
    assert "secure aggregation shows only their sum" in said
    assert "secagg.enabled = false" in said


@pytest.mark.parametrize("rule", ["mean", "fedadam", "rolora", "nested"])
def test_a_rule_over_the_sum_may_do_without_secure_aggregation(rule: str) -> None:
    check(config(rule, enabled=False))


@pytest.mark.parametrize("rule", [one.name for one in AGGREGATORS.values() if one.methods])
def test_another_method_is_refused(rule: str) -> None:
    for method in ("ia3", "bitfit", *({"lora", "ffa_lora"} - set(AGGREGATORS[rule].methods))):
        assert f"aggregation.rule={rule!r}: is for adapter.method" in refused(config(rule, method=method))


@pytest.mark.parametrize("rule", AGGREGATORS)
@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_set_where_it_is_used_and_nowhere_else(rule: str, key: str, earlier: str) -> None:
    needed = {"earlier": (earlier,)} if rule == "olora" else {}
    given = {"proximal": 0.5, "faulty": 1, "penalty": 0.5, "earlier": (earlier,), "ranks": (RankConfig(("elm",), 1),)}
    if key in AGGREGATORS[rule].keys:
        none = {"proximal": 0.0, "faulty": 0, "penalty": 0.0, "earlier": (), "ranks": ()}[key]
        assert f"aggregation.{key}: rule={rule!r} needs this key" in refused(config(rule, **needed | {key: none}))
    else:
        assert f"aggregation.{key}: has no use with rule={rule!r}" in refused(
            config(rule, **needed | {key: given[key]})
        )


@pytest.mark.parametrize("rule", AGGREGATORS)
def test_directions_fit_the_rules_that_the_refusal_names(rule: str, earlier: str) -> None:
    """The median of sites' single updates was let through, against the words of the refusal."""
    made = config(rule, directions=4, **({"earlier": (earlier,)} if rule == "olora" else {}))
    if rule in ("mean", "fedavgm", "fedadam", "fedyogi"):
        check(made)
    else:
        said = refused(made)
        assert "training.directions=4" in said
        assert said.endswith("take one of mean, fedavgm, fedadam, fedyogi")


@pytest.mark.parametrize("rule", REFUSED)
def test_a_rule_that_cannot_be_had_here_says_why(rule: str) -> None:
    said = refused(config(rule))
    assert REFUSED[rule] in said


def test_an_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean trimmed_mean"):
        check(config("trimed_mean"))


@pytest.mark.parametrize(
    ("rule", "changed", "words"),
    [
        ("fedprox", {"steps": 1}, "training.local_steps=1: fedprox"),
        ("fedprox", {"rate": 3.0}, "training.learning_rate * aggregation.proximal=1.5"),
        ("krum", {"n_min": 4}, "secagg.n_min=4: krum with faulty=1 needs 5"),
        ("krum", {"faulty": 2}, "secagg.n_min=5: krum with faulty=2 needs 7"),
        ("trimmed_mean", {"faulty": 2}, "secagg.n_min=3: trimmed_mean with faulty=2 needs 5"),
        ("nested", {"ranks": (RankConfig(("elm", "fir", "ash"), 2),)}, "rank=4: only 2 sites train so many columns"),
        ("nested", {"n_min": 4}, "rank=4: only 3 sites"),
        ("nested", {"ranks": (RankConfig(("elm",), 4),)}, "rank=4: must be from 1 to below adapter.rank=4"),
        ("nested", {"ranks": (RankConfig(("elm",), 0),)}, "rank=0: must be from 1"),
        ("nested", {"ranks": (RankConfig(("oak",), 1),)}, "site='oak': no site of this federation"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(rule: str, changed: dict[str, Any], words: str) -> None:
    assert words in refused(config(rule, **changed))


def test_an_earlier_adapter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no readable adapter_model"):
        check(config("olora", earlier=(str(tmp_path / "none"),)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("proximal = -1.0", "aggregation.proximal=-1.0"),
        ("penalty = nan", "aggregation.penalty=nan"),
        ("faulty = -1", "aggregation.faulty=-1"),
        ("learning_rate = 0.0", "aggregation.learning_rate=0.0"),
        ("[[aggregation.ranks]]\nsites = []\nrank = 1", r"ranks\[0\].sites=\[\]"),
        ('[[aggregation.ranks]]\nsites = ["elm", "elm"]\nrank = 1', "named before"),
        ('[[aggregation.ranks]]\nsites = ["elm"]', "aggregation.ranks.*rank is missing"),
        ("earlier = 3", "aggregation.earlier=3: must be a list"),
        ('[secagg]\nenabled = "no"', "secagg.enabled='no': must be of type bool"),
    ],
)
def test_the_file_is_read_strictly(fed: Path, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "fed.toml"
    path.write_text(fed.read_text().replace("[aggregation]\nlearning_rate = 0.02\n", f"[aggregation]\n{text}\n"))
    with pytest.raises(ConfigError, match=words):
        read_config(path)


def test_paths_are_those_of_the_files_folder_and_sites_may_be_left_out(fed: Path, tmp_path: Path) -> None:
    text = 'earlier = ["old"]\n[[aggregation.ranks]]\nsites = ["elm", "ash"]\nrank = 1\n'
    path = tmp_path / "fed.toml"
    path.write_text(fed.read_text().replace("[aggregation]\nlearning_rate = 0.02\n", f"[aggregation]\n{text}\n"))
    aggregation = read_config(path)[0].aggregation
    assert aggregation.earlier == (str(tmp_path / "old"),)
    assert aggregation.ranks_by_site() == (("ash", 1), ("elm", 1))
    assert aggregation.only(["ash", "birch"]).ranks_by_site() == (("ash", 1),)
    assert aggregation.only(["birch"]) == dataclasses.replace(aggregation, ranks=())
