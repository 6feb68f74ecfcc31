"""A site that holds frozen weights as its package stores them trains the same update to the last bit."""

from pathlib import Path

import numpy as np
import pytest

from offsite.client.home.settings import SiteSettings
from offsite.emulator.runtime.quantized_linear import DequantizingLinear
from offsite.errors import UnknownName
from tests.memory_federation import World, make_world
from tests.rule_worlds import trained


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(fed, tmp_path_factory.mktemp("stored"))


def test_the_same_update_in_less_memory(world: World) -> None:
    updates, held = [], []
    for weights in ("widened", "stored"):
        session, update = trained(world, weights)
        updates.append(update)
        held.append(sum(isinstance(module, DequantizingLinear) for module in session.model.modules()))
    np.testing.assert_array_equal(*updates)
    assert held[0] == 0
    assert held[1] == 4 * 7  # each dense layer of the middle


def test_a_setting_that_is_none_is_refused() -> None:
    assert SiteSettings("ash", "data", weights="stored").weights == "stored"
    with pytest.raises(UnknownName, match="stored"):
        SiteSettings("ash", "data", weights="store")
