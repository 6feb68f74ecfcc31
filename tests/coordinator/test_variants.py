"""A job with two emulators: both are built, gated and measured, and a site can open its own package and no other."""

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.coordinator.config.federation_file import FedConfig, read_config
from offsite.coordinator.job.prepare import Job, Parties, prepare
from offsite.coordinator.job.store import Store
from offsite.coordinator.network.package_delivery import deliver, deliver_all
from offsite.emulator.package import package_reader
from offsite.errors import ConfigError, DigestMismatch, ProtocolViolation, UnknownName
from offsite.privacy.clipping_bound import median_norm
from offsite.protos.signed_job import package_context
from offsite.simulation.run_folder import Run
from offsite.task.tasks import TASKS
from offsite.trust import streaming
from tests.memory_federation import RunningSite, World, make_world

DEFAULT, OTHERS = ("ash", "cedar"), ("birch", "elm")


@pytest.fixture(scope="module")
def world(varied: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(varied, tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="module")
def job(world: World) -> Job:
    return world.run.open_job()


def changed(varied: Path, old: str, new: str) -> FedConfig:
    text = varied.read_text()
    assert text.count(old) == 1
    path = varied.with_name("changed.toml")
    path.write_text(text.replace(old, new))
    return read_config(path)[0]


def make(config: FedConfig, folder: Path, run: Run) -> Job:
    parties = Parties("demo", 1, run.roster(), 3, 1)
    records = run.records(config.data.public)
    return prepare(config, records=records, federation=parties, store=Store(folder), on_step=lambda text: None)


# the job


def test_each_site_is_named_the_emulator_of_its_settings(world: World, job: Job) -> None:
    manifest, folder = world.manifest, world.run.store.folder
    first, other = (package_reader.read_manifest(folder / name) for name in ("package", "packages/birch"))
    assert (first.recipe, first.embedding) == (("int4:32",), "int8")
    assert (other.recipe, other.embedding) == (("skip@2", "int8:32"), "int4:32")
    assert first.geometry == other.geometry
    assert {site: manifest.emulator_of(site) for site in world.sites} == {
        "ash": first.digest(),
        "birch": other.digest(),
        "cedar": first.digest(),
        "elm": other.digest(),
    }
    assert [(one.sites, one.facts) for one in job.emulators] == [(DEFAULT, first), (OTHERS, other)]
    assert [path.name for path in (folder / "packages").iterdir()] == ["birch"]


def test_one_layout_fits_every_emulator_and_the_full_model(world: World, job: Job) -> None:
    for name in ("package", "packages/birch"):
        emulator = attach(package_reader.load(world.run.store.folder / name, dtype=torch.float32), job.manifest.adapter)
        assert Layout.of(emulator) == job.layout == world.manifest.layout


def test_the_clip_is_the_largest_of_the_medians(world: World, job: Job) -> None:
    """The loop engine computes the norms, one example at a time."""
    task, medians = TASKS["causal_lm"], []
    for name in ("package", "packages/birch"):
        emulator = attach(package_reader.load(world.run.store.folder / name, dtype=torch.float32), job.manifest.adapter)
        batches = [job.public.tune.select([place]) for place in range(len(job.public.tune))]
        medians.append(median_norm(emulator, task.losses, batches, "loop"))
    assert max(medians) > 1.001 * min(medians)
    assert job.manifest.privacy.max_grad_norm == pytest.approx(max(medians), rel=1e-4)


def test_each_emulator_is_scored_on_public_text(job: Job) -> None:
    first, other = (one.public.loss for one in job.emulators)
    assert first != other
    assert job.emulators[0].cosine > job.emulators[1].cosine > 0.1  # with a block left out it is further away


def test_a_gate_that_is_missed_names_the_sites(world: World, varied: Path, tmp_path: Path) -> None:
    config = changed(varied, 'embedding = "int4:32"', 'embedding = "int4:32"\ngate = 0.99999')
    with pytest.raises(ConfigError, match=r"^emulator of sites=birch, elm: gradient_cosine=0\.\d\d: below the floor"):
        make(config, tmp_path / "run", world.run)
    config = changed(varied, "gate = 0.1", "gate = 0.99999")  # of [emulator], which a variant takes over
    with pytest.raises(
        ConfigError, match=r"^emulator of sites=ash, cedar: gradient_cosine=[01]\.\d\d: below the floor"
    ):
        make(config, tmp_path / "run", world.run)


def test_a_recipe_that_does_not_exist_is_refused_before_anything_is_built(
    world: World, varied: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnknownName, match="compressor='int5'"):
        make(changed(varied, "int8:32", "int5:32"), tmp_path / "run", world.run)
    assert not (tmp_path / "run" / "package").exists()


def test_a_recipe_that_does_not_fit_names_the_sites(world: World, varied: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^emulator of sites=birch, elm: step='skip@9': place 9"):
        make(changed(varied, "skip@2", "skip@9"), tmp_path / "run", world.run)


def test_a_site_that_is_no_member_is_refused(world: World, varied: Path, tmp_path: Path) -> None:
    config, roster = read_config(varied)[0], world.run.roster()
    parties = Parties("demo", 1, roster[:3], 3, 1)
    with pytest.raises(ConfigError, match=r"sites='elm': no site of this federation; known: ash, birch, cedar"):
        prepare(config, records=[], federation=parties, store=Store(tmp_path), on_step=lambda text: None)


def test_what_a_killed_build_left_is_removed(world: World, varied: Path, tmp_path: Path) -> None:
    for name in ("package", "packages/birch", "packages/old"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "torn").write_text("torn")
    made = make(read_config(varied)[0], tmp_path, world.run)
    assert made.manifest.emulators == world.manifest.emulators  # the same settings give the same bytes
    assert [path.name for path in (tmp_path / "packages").iterdir()] == ["birch"]


# opened again


def reopened(world: World, folder: Path) -> Job:
    shutil.copytree(world.run.store.folder, folder)
    return Run.open(folder).open_job()


def test_a_job_is_opened_again_as_it_was_made(world: World, job: Job, tmp_path: Path) -> None:
    again = reopened(world, tmp_path / "run")
    assert (again.manifest, again.emulators, again.zero_shot) == (job.manifest, job.emulators, job.zero_shot)


@pytest.mark.parametrize("name", ["package", "packages/birch"])
def test_another_package_in_the_place_of_one_is_refused(world: World, tmp_path: Path, name: str) -> None:
    folder, other = tmp_path / "run", {"package": "packages/birch", "packages/birch": "package"}[name]
    shutil.copytree(world.run.store.folder, folder)
    shutil.rmtree(folder / name)
    shutil.copytree(world.run.store.folder / other, folder / name)
    with pytest.raises(
        DigestMismatch, match=r"^emulator=\w{16}: run '.*run' began with \w{16}; put that emulator back"
    ):
        Run.open(folder).open_job()


# handed out


def test_each_site_opens_its_own_package_and_nobody_elses(world: World) -> None:
    store, files = world.run.store, {}
    for site, key in world.sealing.items():
        delivery = world.deliveries[site]
        assert set(delivery.sealed) == set(DEFAULT if site in DEFAULT else OTHERS)
        context, plain = package_context(world.manifest, delivery.sha256), io.BytesIO()
        sealed = (world.depot / delivery.sha256.hex()).read_bytes()
        streaming.decrypt(io.BytesIO(sealed), plain, key.open(delivery.sealed[site], context))
        folder = store.package if site in DEFAULT else store.package_of("birch")
        assert package_reader.read_manifest(folder).to_bytes() in plain.getvalue()
        for box in (box for other, box in delivery.sealed.items() if other != site):
            with pytest.raises(Exception, match="seal"):
                key.open(box, context)
        files[site] = delivery.sha256
    assert files["ash"] == files["cedar"] != files["birch"] == files["elm"]
    for site in DEFAULT:
        delivery = world.deliveries["birch"]
        for box in delivery.sealed.values():
            with pytest.raises(Exception, match="seal"):
                world.sealing[site].open(box, package_context(world.manifest, delivery.sha256))


def test_a_restart_hands_out_the_same_and_mends_what_is_torn_alone(world: World, tmp_path: Path) -> None:
    store, depot = Store(tmp_path / "run"), tmp_path / "depot"
    for name in ("package", "packages"):
        shutil.copytree(world.run.store.folder / name, store.folder / name)

    def again() -> dict[str, bytes]:
        return {site: one.sha256 for site, one in deliver_all(store, depot, world.manifest, world.federation).items()}

    first = again()
    assert again() == first
    assert sorted(path.name for path in depot.iterdir()) == sorted({digest.hex() for digest in first.values()})
    (depot / first["birch"].hex()).write_bytes(b"torn")
    second = again()
    assert (second["ash"], second["cedar"]) == (first["ash"], first["cedar"])
    assert second["birch"] == second["elm"] != first["birch"]
    (store.folder / "delivery-birch.json").unlink()
    third = again()
    assert third["ash"] == first["ash"]
    assert third["birch"] == third["elm"] not in (first["birch"], second["birch"])
    (store.folder / "delivery.json").write_text("{")
    fourth = again()
    assert fourth["birch"] == third["birch"]
    assert fourth["ash"] == fourth["cedar"] != first["ash"]


def test_facts_of_another_emulator_are_made_anew(world: World, tmp_path: Path) -> None:
    """The facts seal to other sites; a copied file gives no site a key of another site."""
    store, depot = Store(tmp_path / "run"), tmp_path / "depot"
    for name in ("package", "packages"):
        shutil.copytree(world.run.store.folder / name, store.folder / name)
    deliver_all(store, depot, world.manifest, world.federation)
    shutil.copyfile(store.folder / "delivery.json", store.folder / "delivery-birch.json")
    found = deliver_all(store, depot, world.manifest, world.federation)
    assert set(found["birch"].sealed) == set(OTHERS)
    assert found["birch"].sha256 != found["ash"].sha256
    assert set(json.loads((store.folder / "delivery-birch.json").read_text())["sealed"]) == set(OTHERS)


# at a site


def test_each_site_fetches_and_unpacks_its_own(world: World, tmp_path: Path) -> None:
    for name in ("ash", "birch"):
        site = RunningSite(world, name, tmp_path / name)
        site.ready()
        assert [path.name for path in (tmp_path / name / "packages").iterdir()] == [world.manifest.emulator_of(name)]


def test_a_site_takes_no_other_sites_package(world: World, tmp_path: Path) -> None:
    """This holds also where the coordinator seals the package to that site: the digest differs from the manifest's."""
    store, folder = world.run.store, tmp_path / "depot"
    sealed = deliver(
        store.package, folder, world.manifest, world.federation, tmp_path / "facts.json", sites=world.sites
    )
    swapped = dataclasses.replace(world, depot=folder, deliveries=world.deliveries | {"birch": sealed})
    site = RunningSite(swapped, "birch", tmp_path / "birch")
    reply = site.ask("offer", swapped.offer("birch"))
    while getattr(reply, "state", "") == "fetching":
        reply = site.ask("offer", swapped.offer("birch"))
    assert getattr(reply, "state", "") == "refused"
    assert re.search(rf"DigestMismatch: .*announced {world.manifest.emulator_of('birch')}", site.reason), site.reason


def test_a_site_does_not_train_on_an_emulator_that_only_it_was_told_of(world: World, tmp_path: Path) -> None:
    """The coordinator signs the whole manifest, so that this is another job, which the other sites do not know."""
    other = dataclasses.replace(world.manifest, emulators=(("ash", "ab" * 32), *world.manifest.emulators))
    forged = dataclasses.replace(world.offer("ash"), manifest=other.to_bytes())
    refusal = RunningSite(world, "ash", tmp_path / "ash").ask("offer", forged)
    assert getattr(refusal, "kind", "") == ProtocolViolation.__name__
