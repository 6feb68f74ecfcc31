"""The table [secagg] of a simulation: n_min against a third of all sites, for every number of sites."""

from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.config.federation_file import FedConfig, parse_config
from offsite.errors import ConfigError


def config(members: int, **secagg: Any) -> FedConfig:
    sites = [{"name": f"site{place}", "train": "train", "heldout": "heldout"} for place in range(members)]
    content = {"model": {"path": "model"}, "data": {"public": "public"}, "sites": sites, "secagg": secagg}
    return parse_config(content, Path("there"))


@pytest.mark.parametrize("members", range(3, 20))
def test_n_min_leaves_two_sites_beside_a_third(members: int) -> None:
    needed = max(3, members // 3 + 2)
    assert config(members).secagg.fewest(members) == needed
    assert config(members, n_min=needed).secagg.fewest(members) == needed
    for n_min in range(3, needed):
        with pytest.raises(ConfigError, match=rf"secagg.n_min={n_min} of n_sites={members}: must be at least {needed}"):
            config(members, n_min=n_min)


def test_n_min_is_at_least_three_and_at_most_all_sites() -> None:
    for n_min in (-1, 1, 2):
        with pytest.raises(ConfigError, match=f"secagg.n_min={n_min}: must be at least 3"):
            config(4, n_min=n_min)
    with pytest.raises(ConfigError, match=r"n_sites=4: .* n_min=5"):
        config(4, n_min=5)
