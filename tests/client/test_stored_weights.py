"""A site that holds frozen weights as its package stores them trains the same update to the last bit."""

from pathlib import Path

import numpy as np
import pytest

from client.installation import SiteSettings
from client.train import local_update
from client.workbench import open_workbench
from emulator.held import HeldLinear
from emulator.verdict import Limits
from errors import UnknownName
from privacy.randomness import Randomness
from tests.memory_federation import World, make_world
from tests.rule_worlds import examples_of


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(fed, tmp_path_factory.mktemp("stored"))


def test_the_same_update_in_less_memory(world: World) -> None:
    manifest, updates, held = world.manifest, [], []
    for weights in ("widened", "stored"):
        bench = open_workbench(
            world.run.store.package_of(""),
            manifest,
            emulator=manifest.emulator_of("ash"),
            limits=Limits.for_owner(64, 1.0),
            seed=3,
            weights=weights,
        )
        trained = local_update(
            bench,
            world.start,
            examples_of(world.run, "ash", manifest, bench),
            manifest=manifest,
            plan=world.run.site("ash", manifest, bench).plan,
            randomness=Randomness.for_simulation(1, "stored"),
        )
        updates.append(trained.update)
        held.append(sum(isinstance(module, HeldLinear) for module in bench.model.modules()))
    np.testing.assert_array_equal(*updates)
    assert held[0] == 0
    assert held[1] == 4 * 7  # each dense layer of the middle


def test_a_setting_that_is_none_is_refused() -> None:
    assert SiteSettings("ash", "data", weights="stored").weights == "stored"
    with pytest.raises(UnknownName, match="stored"):
        SiteSettings("ash", "data", weights="store")
