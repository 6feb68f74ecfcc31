"""The emulator of each site by the federation file, and every way in which the file fails to name it."""

import itertools
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.config.emulator_table import EmulatorConfig, EmulatorVariant, VariantConfig
from offsite.coordinator.config.federation_file import FedConfig, parse_config
from offsite.errors import ConfigError
from offsite.simulation.run_folder import with_options

SITES = ("ash", "birch", "cedar", "elm")
FED = """
model.path = "model"
data.public = "public"
data.sites_dir = "sites"
data.owners = ["ash", "birch", "cedar", "elm"]
"""


def config(variants: str, fed: str = FED) -> FedConfig:
    return parse_config(tomllib.loads(f"{fed}\n[emulator]\nembedding = 'int8'\n{variants}"), Path("there"))


def variant(*sites: str, **settings: Any) -> VariantConfig:
    return VariantConfig(sites, **settings)


def test_what_is_not_given_is_as_in_emulator() -> None:
    text = """
    [[emulator.variants]]
    sites = ["elm", "birch"]
    compress = ["skip_uniform:0.5", "int4:64"]
    gate = 0.3
    [[emulator.variants]]
    sites = ["ash"]
    embedding = "int4"
    """
    assert config(text).emulator.kinds(SITES) == (
        EmulatorVariant(("cedar",), ("int4:64",), "int8", 0.6),
        EmulatorVariant(("ash",), ("int4:64",), "int4", 0.6),
        EmulatorVariant(("birch", "elm"), ("skip_uniform:0.5", "int4:64"), "int8", 0.3),
    )


def test_without_variants_there_is_one_for_all() -> None:
    assert config("").emulator.kinds(SITES) == (EmulatorVariant(SITES, ("int4:64",), "int8", 0.6),)


def test_equal_settings_are_one_emulator_that_keeps_to_each_gate() -> None:
    emulator = EmulatorConfig(
        compress=("int4",),
        variants=(
            variant("elm", compress=("int3",), gate=0.2),
            variant("ash", compress=("int4",), gate=0.7),
            variant("birch", compress=("int3",), gate=0.4),
        ),
    )
    assert emulator.kinds(SITES) == (
        EmulatorVariant(("ash", "cedar"), ("int4",), "int8", 0.7),
        EmulatorVariant(("birch", "elm"), ("int3",), "int8", 0.4),
    )


def test_the_order_of_the_file_makes_no_difference() -> None:
    variants = [variant("elm", compress=("a",)), variant("cedar", embedding="int4"), variant("ash", compress=("b",))]
    kinds = {EmulatorConfig(variants=order).kinds(SITES) for order in itertools.permutations(variants)}
    assert len(kinds) == 1
    assert [kind.sites for kind in kinds.pop()] == [("birch",), ("ash",), ("cedar",), ("elm",)]


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ('sites = ["elk"]', r"emulator.variants\[0\].sites='elk': no site of this federation; did you mean elm"),
        ("sites = []", r"emulator.variants\[0\].sites=\[\]: a variant is for one site or more; name sites"),
        ('sites = ["elm", "elm"]', r"emulator.variants\[0\].sites='elm': named before; a site has one emulator"),
        ('sites = ["elm"]\n[[emulator.variants]]\nsites = ["elm"]', r"variants\[1\].sites='elm': named before"),
        ('sites = ["elm"]\ngate = 1.5', r"emulator.variants\[0\].gate=1.5: a cosine lies in \[-1, 1\]"),
        ('sites = ["elm"]\nfirst = 1', r"config key emulator.variants\[0\].first is not known; "),
        ('sites = ["elm"]\ncompres = ["int4"]', r"emulator.variants\[0\].compres is not known; did you mean compress"),
        ('compress = ["int4"]', r"config key emulator.variants\[0\].sites is missing; add it"),
        ('sites = ["elm"]\ncompress = "int4"', r"emulator.variants\[0\].compress='int4': must be a list"),
        ('sites = "elm"', r"emulator.variants\[0\].sites='elm': must be a list"),
        ("sites = [1]", r"emulator.variants\[0\].sites\[0\]=1: must be of type str"),
        ('sites = ["ash", "birch", "cedar", "elm"]\nembedding = "int4"', r"emulator.variants name every site, so that"),
    ],
)
def test_what_says_nothing_is_refused_in_one_line(variants: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        config(f"[[emulator.variants]]\n{variants}")
    assert "\n" not in str(caught.value)


def test_members_of_a_real_federation_are_not_in_the_file() -> None:
    """The names are compared with the roster when the job is prepared, see `tests/coordinator/test_variants.py`."""
    real = "model.path = 'm'\ndata.public = 'p'\ncoordinator.home = 'home'\n"
    emulator = config("[[emulator.variants]]\nsites = ['elk']", real).emulator
    with pytest.raises(ConfigError, match=r"sites='elk': no site of this federation; did you mean elm"):
        emulator.kinds(SITES)


@pytest.mark.parametrize(
    ("sites", "expected"),
    [('["birch", "elm"]', [("ash", "cedar"), ("birch",)]), ('["elm"]', [("ash", "birch", "cedar")])],
)
def test_fewer_sites_by_option_leave_the_others_out_of_variants(sites: str, expected: list[tuple[str, ...]]) -> None:
    whole = config(f"[[emulator.variants]]\nsites = {sites}\ncompress = ['int3']")
    fewer = with_options(whole, seed=None, rounds=None, sites=3)
    assert [kind.sites for kind in fewer.emulator.kinds(SITES[:3])] == expected


def test_a_run_folder_keeps_the_variants() -> None:
    once = config("[[emulator.variants]]\nsites = ['elm']\ncompress = ['int3']")
    again = parse_config(json.loads(json.dumps(once.to_dict())), Path("elsewhere"))
    assert again.emulator == once.emulator
    assert (again.emulator.variants[0].embedding, again.emulator.variants[0].gate) == (None, None)


def test_a_refresh_beside_variants_is_refused() -> None:
    text = """
    refresh = 2
    [[emulator.variants]]
    sites = ["ash"]
    compress = ["int8"]
    """
    with pytest.raises(ConfigError, match=r"emulator.refresh=2: only a single emulator .* leave emulator.variants out"):
        config(text)
