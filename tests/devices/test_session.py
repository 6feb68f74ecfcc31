"""A site's whole way on another device: package, vetting, adapter, probe, training, refresh."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offsite.client.training.emulator_session import EmulatorSession, open_session
from offsite.client.training.local_update import SiteJob, Trained, local_update
from offsite.client.training.privacy_plan import plan_for
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.privacy.randomness import Randomness
from tests.fake_device import fake_device
from tests.memory_federation import World, make_world


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    on_cpu = fed.with_name("on_cpu.toml")  # here `auto` finds the fake device
    on_cpu.write_text(f'{fed.read_text()}\n[compute]\ndevice = "cpu"\n')
    return make_world(on_cpu, tmp_path_factory.mktemp("devices"))


def session_on(world: World, device: torch.device | str, weights: str = "widened") -> EmulatorSession:
    return open_session(
        world.run.store.package,
        world.manifest,
        emulator=world.manifest.emulator,
        limits=VettingThresholds(),
        seed=1,
        weights=weights,
        device=device,
    )


def trained(world: World, session: EmulatorSession) -> Trained:
    site = world.run.config.sites[0]
    examples: Any = world.run.examples(site.train, world.manifest, world.session)
    job = SiteJob(site.name, world.manifest, session, examples, plan_for(world.manifest, len(examples)))
    return local_update(job, world.start, randomness=Randomness.for_simulation(1, "devices"))


@pytest.mark.parametrize("weights", ["widened", "stored"])
def test_a_site_trains_on_its_device(world: World, weights: str) -> None:
    expected = trained(world, session_on(world, "cpu", weights))
    with fake_device() as device:
        session = session_on(world, device, weights)
        assert {parameter.device for parameter in session.model.parameters()} == {device}
        found = trained(world, session)
    np.testing.assert_allclose(found.update, expected.update, rtol=1e-4, atol=1e-7)
    assert dataclasses.replace(found.outcome, losses=(), norm_median=0.0) == dataclasses.replace(
        expected.outcome, losses=(), norm_median=0.0
    )
    assert found.engine == expected.engine
