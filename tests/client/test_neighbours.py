"""How far apart neighbouring data sets are in what leaves a site, from training to ring, with the noise on.

The noise is as long as the clip, so that one record accounts for a distance of 1.00 standard deviations: at the ends of
the manifest's ranges as anywhere else.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.client.training.emulator_session import EmulatorSession
from offsite.client.training.local_update import SiteJob, local_update
from offsite.client.training.privacy_plan import SitePlan
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.privacy.engines import ENGINES
from offsite.privacy.randomness import Randomness
from offsite.privacy.ranges import HIGHEST, LOWEST, LOWEST_SPACING
from offsite.privacy.sampler import poisson
from offsite.protos.aggregation import AggregationTerms
from offsite.protos.job_manifest import JobManifest
from offsite.secagg import ring
from offsite.task.causal_lm import CausalLM
from offsite.task.examples import Examples
from tests.contracts.test_engines import plain
from tests.protos.test_manifest import JOB

RECORDS, BATCH, MEMBERS, DIRECTIONS = 8, 4, 4, 8
EMPTY = SitePlan(RECORDS, 1e-9, 1e-6, 1.0, 1.0, 1)  # no record is ever drawn, and the update is noise alone
HALF = dataclasses.replace(EMPTY, sample_rate=0.5)


class Steep(CausalLM):
    """Losses so steep that every gradient is above the largest clip."""

    def losses(self, model: Any, batch: Examples) -> torch.Tensor:
        return super().losses(model, batch) * 1e15


def manifest_of(layout: Layout, clip: float, rate: float, directions: int) -> JobManifest:
    return dataclasses.replace(
        JOB,
        rounds=1,
        local_steps=1,
        layout=layout,
        learning_rate=rate,
        update_bound=8 * clip * rate / max(directions, 1),
        privacy=dataclasses.replace(JOB.privacy, max_grad_norm=clip, batch=BATCH),
        aggregation=AggregationTerms(directions=directions, spacing=LOWEST_SPACING if directions else 0.0),
    )


def session_of(engine: str) -> EmulatorSession:
    model = attach(plain("llama"), AdapterSpec("ffa_lora", rank=3, slots=("model.layers.0",)))
    layout, unused = Layout.of(model), None
    start = np.zeros(layout.size, dtype=np.float32)
    limits: Any = VettingThresholds()
    return EmulatorSession(model, Steep(), layout, unused, (), limits, unused, unused, start, 0, engine)  # type: ignore[arg-type]


def released(session: EmulatorSession, manifest: JobManifest, plan: SitePlan, canary: bool, seed: int) -> np.ndarray:
    """Returns the update of a site as a sum over that site would be decoded, float64."""
    ids = torch.randint(1, 97, (RECORDS, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0] = int(canary)
    job = SiteJob("east", manifest, session, Examples(ids, mask), plan)
    trained = local_update(job, session.start, randomness=Randomness.for_simulation(seed, "neighbours"))
    assert trained.bounded == 0
    clip = manifest.update_bound
    return ring.decode(ring.encode(trained.update, clip=clip, members=MEMBERS), clip=clip, members=MEMBERS, summed=1)


def seed_that_draws_the_canary() -> int:
    def drawn(seed: int) -> Any:
        return poisson(RECORDS, HALF.sample_rate, Randomness.for_simulation(seed, "neighbours"))

    return next(seed for seed in range(100) if 0 in drawn(seed) and len(drawn(seed)) > 3)


@pytest.mark.parametrize("rate", [LOWEST, 1.0, HIGHEST])
@pytest.mark.parametrize("clip", [LOWEST, 1.0, HIGHEST])
@pytest.mark.parametrize("engine", [*ENGINES, "zero_order"])
def test_a_record_moves_what_leaves_by_one_standard_deviation(engine: str, clip: float, rate: float) -> None:
    session = session_of(engine)
    manifest = manifest_of(session.layout, clip, rate, DIRECTIONS if engine == "zero_order" else 0)
    assert JobManifest.from_bytes(manifest.to_bytes()) == manifest
    seed = seed_that_draws_the_canary()
    moved = np.subtract(*(released(session, manifest, HALF, canary, seed) for canary in (True, False)))
    noises = 60 if engine == "zero_order" else 1
    noise = np.concatenate([released(session, manifest, EMPTY, True, 100 + each) for each in range(noises)])
    assert np.linalg.norm(moved) / noise.std() == pytest.approx(1.0, abs=0.2)
