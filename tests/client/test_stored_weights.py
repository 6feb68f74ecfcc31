"""A site that holds frozen weights as its package stores them trains the same update to the last bit."""

from pathlib import Path

import numpy as np
import pytest
from torch import nn

from offsite.client.home.settings import SiteSettings
from offsite.emulator.runtime.quantized_linear import DequantizingEmbedding, DequantizingLinear
from offsite.emulator.runtime.refresh import plain_of
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
        held.append(
            [type(module) for module in session.model.modules() if isinstance(module, (nn.Linear, nn.Embedding))]
        )
    np.testing.assert_array_equal(*updates)
    counts = [(kinds.count(DequantizingLinear), kinds.count(DequantizingEmbedding)) for kinds in held]
    assert counts == [(0, 0), (4 * 7 + 1, 1)]  # each dense layer of the middle, the head, and the table of words


def test_activations_are_computed_again_for_the_same_update(world: World) -> None:
    """`auto` counts what autograd keeps; a model as small as this one keeps more than it weighs."""
    updates, changed = [], []
    for recompute in ("never", "always", "auto"):
        session, update = trained(world, "stored", recompute)
        updates.append(update)
        plain = plain_of(session.model)
        changed.append(sum("forward" in vars(plain.get_submodule(path)) for path in session.frame.tower))
    assert changed == [0, 4, 4]  # the middle
    for update in updates[1:]:
        np.testing.assert_array_equal(update, updates[0])


def test_a_setting_that_is_none_is_refused() -> None:
    assert SiteSettings("ash", "data", weights="stored").weights == "stored"
    with pytest.raises(UnknownName, match="stored"):
        SiteSettings("ash", "data", weights="store")
    with pytest.raises(UnknownName, match="auto"):
        SiteSettings("ash", "data", recompute="automatic")
