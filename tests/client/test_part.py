"""A site trains, clips and noises exactly its part of the adapter, by a slow DP-SGD on whole gradients."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from offsite.adapter.layout import Layout
from offsite.client.training.emulator_session import EmulatorSession
from offsite.client.training.local_update import SiteJob, local_update
from offsite.client.training.trainable_subset import only_trainable
from offsite.coordinator.config.federation_file import read_config
from offsite.errors import UnsupportedModel
from offsite.privacy.batches import trainable
from offsite.privacy.randomness import Randomness
from offsite.protos.aggregation import AggregationTerms
from offsite.protos.job_manifest import JobManifest
from offsite.protos.upload import select_uploaded
from offsite.simulation.run_folder import Run, simulated_sessions
from tests.client.test_policy import JOB
from tests.rule_worlds import examples_of, mask_of, slow_update, written

EVERYTHING = slice(None)


@dataclasses.dataclass
class World:
    """A job with its run and opened emulator."""

    run: Run
    manifest: JobManifest
    session: EmulatorSession
    start: np.ndarray


def opened(path: Path, folder: Path) -> World:
    settings, sha256 = read_config(path)
    run = Run.create(settings, sha256, folder / "run")
    manifest = run.open_job().manifest
    session = simulated_sessions(run, manifest)["ash"]
    start = session.layout.read(session.model)
    # B is zero at first, and A then has no gradient
    draw = np.random.default_rng(3).normal(size=start.size, scale=0.05)
    return World(run, manifest, session, (start + draw).astype(np.float32))


@pytest.fixture(scope="module")
def rolora(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return opened(written(fed, "rolora", method="lora", steps=2), tmp_path_factory.mktemp("rolora"))


@pytest.fixture(scope="module")
def nested(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return opened(written(fed, "nested", steps=2), tmp_path_factory.mktemp("nested"))


def trained(world: World, site: str, number: int, **terms: float) -> tuple[np.ndarray, np.ndarray]:
    """Our update, and the same update by the slow way in the whole adapter's layout."""
    manifest = world.manifest
    mu = float(terms.get("proximal", 0.0))
    if terms:
        manifest = dataclasses.replace(manifest, aggregation=dataclasses.replace(manifest.aggregation, **terms))
    plan = world.run.site(site, world.manifest, world.session).plan
    examples = examples_of(world.run, site, manifest, world.session)
    job = SiteJob(site, manifest, world.session, examples, plan)
    found = local_update(job, world.start, randomness=Randomness.for_simulation(5, site), number=number)
    factor = ".lora_B." if number % 2 or not manifest.aggregation.alternate else ".lora_A."
    mask = mask_of(world.session, {factor: slice(0, manifest.rank_of(site)) if "B" in factor else EVERYTHING})
    slow = slow_update(
        world.session,
        world.start,
        examples,
        manifest=manifest,
        plan=plan,
        randomness=Randomness.for_simulation(5, site),
        mask=mask,
        proximal=mu,
    )
    assert not found.bounded
    assert ((slow != 0) == mask).all()
    return found.update, slow


@pytest.mark.parametrize("number", [1, 2])
def test_in_turn_only_one_factor_is_trained_noised_and_uploaded(rolora: World, number: int) -> None:
    update, slow = trained(rolora, "ash", number)
    names = rolora.manifest.upload_layout(number).names
    assert len(names) == len(rolora.session.layout.names) / 2
    assert all((".lora_B." if number % 2 else ".lora_A.") in name for name in names)
    np.testing.assert_allclose(update, slow[slow != 0], rtol=1e-3, atol=1e-6)
    assert np.abs(update).min() > 0


@pytest.mark.parametrize(("site", "rank"), [("elm", 1), ("ash", 3)])
def test_a_site_of_smaller_rank_trains_the_first_columns_alone(nested: World, site: str, rank: int) -> None:
    update, slow = trained(nested, site, 1)
    np.testing.assert_allclose(update, slow, rtol=1e-3, atol=1e-6)
    for values in nested.session.layout.named(update).values():
        assert (values[:, rank:] == 0).all()
        assert (values[:, :rank] != 0).all()


def test_a_training_leaves_the_emulator_as_it_was(nested: World, rolora: World) -> None:
    for world, site in ((nested, "elm"), (rolora, "ash")):
        before = {name: id(parameter) for name, parameter in world.session.model.named_parameters()}
        trained(world, site, 2)
        assert {name: id(parameter) for name, parameter in world.session.model.named_parameters()} == before
        assert Layout.of(world.session.model) == world.session.layout


def test_a_training_that_fails_leaves_it_so_too(nested: World) -> None:
    model = nested.session.model
    before = {name: id(parameter) for name, parameter in model.named_parameters()}

    def fail() -> None:
        with only_trainable(model, nested.manifest, site="elm", number=1):
            assert len(trainable(model)) == len(nested.session.layout.names)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_the_other_columns_still_take_part_in_the_forward_pass(nested: World) -> None:
    model, ids = nested.session.model, torch.arange(3, 19).reshape(2, 8)
    nested.session.put(nested.start)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        with only_trainable(model, nested.manifest, site="elm", number=1):
            part = model(input_ids=ids).logits
    assert float((whole - part).abs().max()) < 1e-5


def test_an_adapter_without_columns_is_refused() -> None:
    model = torch.nn.Linear(3, 3)
    manifest = dataclasses.replace(JOB, aggregation=AggregationTerms(ranks=(("east", 2),)))
    with (
        pytest.raises(UnsupportedModel, match="no plain factor B"),
        only_trainable(model, manifest, site="east", number=1),
    ):
        pass


def test_a_pull_back_costs_no_privacy_and_is_the_papers(rolora: World, nested: World) -> None:
    """Same event, same batches, another update: mu (w - w_start) is added to each step's noisy mean gradient."""
    for world, site in ((rolora, "ash"), (nested, "elm")):
        pulled, slow = trained(world, site, 1, proximal=0.8)
        np.testing.assert_allclose(pulled, select_uploaded(world.manifest, 1, slow), rtol=1e-3, atol=1e-6)
        free, _ = trained(world, site, 1)
        assert np.abs(pulled - free).max() > 1e-4
    plan = rolora.run.site("ash", rolora.manifest, rolora.session).plan
    outcomes = []
    for proximal in (0.0, 0.8):
        terms = dataclasses.replace(rolora.manifest.aggregation, proximal=proximal)
        manifest = dataclasses.replace(rolora.manifest, aggregation=terms)
        examples = examples_of(rolora.run, "ash", manifest, rolora.session)
        job = SiteJob("ash", manifest, rolora.session, examples, plan)
        outcomes.append(local_update(job, rolora.start, randomness=Randomness.for_simulation(6, "ash")).outcome)
    free, pulled = outcomes
    assert free.event == pulled.event
    assert free.event is not None
    assert free.event.steps == 2
    assert free.batch_sizes == pulled.batch_sizes
    assert free.losses[0] == pytest.approx(pulled.losses[0])
