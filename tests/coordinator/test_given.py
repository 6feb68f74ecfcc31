"""Jobs with auxiliary tensors, from the federation file to the plug-in: Fisher masks, MAD-X and AdapterFusion."""

import dataclasses
import hashlib
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from offsite.adapter.earlier import earlier_bottlenecks
from offsite.adapter.export import export, load
from offsite.adapter.methods import attach
from offsite.adapter.methods.masked import largest
from offsite.adapter.spec import AdapterSpec
from offsite.client.training.emulator_session import open_session
from offsite.coordinator.config.federation_file import read_config
from offsite.coordinator.job.auxiliary_tensors import check_frozen, check_mask, collected
from offsite.coordinator.job.public_records import public_records
from offsite.coordinator.rounds.emulator_refresh import DeployedEmulator
from offsite.coordinator.rounds.exchange import MemoryExchange
from offsite.coordinator.rounds.round import RoundPlan, run_round
from offsite.emulator.package import auxiliary_file, package_reader
from offsite.emulator.package.manifest import GIVEN, FileEntry
from offsite.emulator.runtime.plug_in import plug
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.errors import ConfigError, DataError, MalformedMessage, OffsiteError, RangeError, UnsupportedModel
from offsite.simulation.run_folder import Run
from offsite.task.tasks import TASKS
from tests.conftest import VARIANT
from tests.memory_federation import World, make_world, open_sites

TASK = TASKS["causal_lm"]
SLOTS = ("model.layers.0", "model.layers.5")
FISHER = 'method = "masked"\noptions = { by = "fisher", density = 0.05 }'


def written(fed: Path, name: str, adapter: str, folder: Path | None = None) -> Path:
    """Writes the tiny world's federation file with another adapter."""
    where = folder or fed.parent
    text = fed.read_text().replace("[training]", f'[privacy]\naccountant = "rdp"\n\n[adapter]\n{adapter}\n\n[training]')
    path = where / f"{name}.toml"
    path.write_text(text)
    return path


def one_round(world: World, folder: Path) -> np.ndarray:
    """Runs a round over real sites with secure aggregation, and returns the adapter after it."""
    exchange = MemoryExchange({name: site.service.handle for name, site in open_sites(world, folder).items()})
    result = run_round(world.manifest, RoundPlan(1, 1, bytes(32), world.sites), world.start, exchange)
    assert result.members == world.sites
    assert np.abs(result.update).max() > 0
    return (world.start + result.update / len(world.sites)).astype(np.float32)


def job_of(world: World) -> Any:
    return world.run.open_job()  # opened again, from what lies in the run folder


def exported(world: World, adapter: np.ndarray, folder: Path) -> Path:
    """Plugs an adapter into the full model of the job and exports it."""
    job = job_of(world)
    plug(job.full, job.layout, adapter)
    export(job.full, world.manifest.adapter, folder, base="tiny", auxiliary=job.given)
    return folder


def plain(world: World) -> Any:
    return TASK.load(world.run.config.model.path, dtype=torch.float32)


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 19)[None]).logits


@pytest.fixture(scope="module")
def languages(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Exports of two earlier bottlenecks, the first from a round of real sites, the second of another rank."""
    folder = tmp_path_factory.mktemp("languages")
    world = make_world(written(fed, "bottleneck", 'method = "bottleneck"\nrank = 3'), folder / "world")
    first = exported(world, one_round(world, folder / "sites"), folder / "a")
    spec = AdapterSpec("bottleneck", rank=2, slots=SLOTS, seed=5)
    model = attach(plain(world), spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "offsite_" in name:
                parameter.add_(0.1)
    export(model, spec, folder / "b", base="tiny")
    return [first, folder / "b"]


def test_a_mask_by_fisher_information_of_public_data(fed: Path, tmp_path: Path) -> None:
    world = make_world(written(fed, "fisher", FISHER), tmp_path / "world")
    given = auxiliary_file.read(world.run.store.package, package_reader.read_manifest(world.run.store.package))
    base = plain(world)
    for name, places in given.items():
        weight = base.get_submodule(name.removesuffix(".places")).weight
        assert len(places) == round(0.05 * weight.numel())
        assert places.tolist() != largest(weight, len(places)).tolist()
    folder = exported(world, one_round(world, tmp_path / "sites"), tmp_path / "a")
    stored = load_file(folder / "adapter_model.safetensors")
    tuned = load(plain(world), folder)
    by_hand = plain(world)
    with torch.no_grad():
        for name in given:
            path = name.removesuffix(".places")
            values = stored[f"{path}.offsite_update.values"]
            by_hand.get_submodule(path).weight.view(-1)[stored[f"given.{name}"].long()] += values
    assert torch.allclose(outputs(tuned), outputs(by_hand), atol=1e-5)
    assert (outputs(tuned) - outputs(base)).abs().max() > 1e-5


def test_a_mask_reads_public_data_alone(fed: Path, tmp_path: Path) -> None:
    """Without any file of the sites, the mask is the same; with other public text, the mask is another."""
    folder = tmp_path / "world"
    (folder / "data" / "public").mkdir(parents=True)
    (folder / "model").symlink_to(fed.parent / "model")
    text = (fed.parent / "data" / "public" / "text.txt").read_text()
    found = []
    for content in (text, text, " ".join(reversed(text.split()))):
        (folder / "data" / "public" / "text.txt").write_text(content)
        config, sha256 = read_config(written(fed, "fisher", FISHER, folder))
        records = Run.create(config, sha256, tmp_path / f"run{len(found)}").records(config.data.public)
        model = TASK.load(config.model.path, dtype=torch.float32)
        public = public_records(config, TASK, TASK.load_processor(config.model.path), records, model.config)
        spec = config.adapter.spec(slots=SLOTS, seed=1)
        found.append(collected(config, model, spec, TASK, public, lambda step: None))
    same, again, other = ({name: tensor.tolist() for name, tensor in one.items()} for one in found)
    assert same == again != other


def test_all_emulators_of_a_job_hold_the_same_mask(fed: Path, tmp_path: Path) -> None:
    path = written(fed, "varied_fisher", FISHER)
    path.write_text(path.read_text().replace("[training]", f"{VARIANT}\n[training]"))
    settings, sha256 = read_config(path)
    job = Run.create(settings, sha256, tmp_path / "run").open_job()
    first, second = (one.facts for one in job.emulators)
    assert first.digest() != second.digest()
    assert first.files[GIVEN] == second.files[GIVEN]


@pytest.fixture(scope="module")
def madx(fed: Path, languages: list[Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    path = written(fed, "madx", f'method = "madx"\nrank = 2\nfrozen = ["{languages[0]}"]')
    return make_world(path, tmp_path_factory.mktemp("madx"))


def test_a_task_adapter_is_trained_over_a_language_and_serves_another(
    madx: World, languages: list[Path], tmp_path: Path
) -> None:
    world = madx
    adapter = one_round(world, tmp_path / "sites")
    assert torch.equal(outputs(job_of(world).full), outputs(load(plain(world), languages[0])))  # at its start
    folder = exported(world, adapter, tmp_path / "a")
    tuned, start = load(plain(world), folder), load(plain(world), languages[0])
    assert (outputs(tuned) - outputs(start)).abs().max() > 1e-5
    other = load(plain(world), folder, auxiliary=earlier_bottlenecks(languages[1:], SLOTS))
    assert (outputs(other) - outputs(tuned)).abs().max() > 1e-3
    under = load(plain(world), languages[1])
    stored = load_file(folder / "adapter_model.safetensors")
    for slot in SLOTS:  # by hand: the trained adapter behind the other language's own model
        under.get_submodule(slot).register_forward_hook(_bottleneck(stored, slot))
    assert torch.allclose(outputs(other), outputs(under), atol=1e-5)


def _bottleneck(values: dict[str, torch.Tensor], slot: str) -> Any:
    def hook(block: Any, args: Any, hidden: torch.Tensor) -> torch.Tensor:
        down, low, up, high = (
            values[f"{slot}.offsite_bottleneck.{part}"] for part in ("down.weight", "down.bias", "up.weight", "up.bias")
        )
        return hidden + torch.nn.functional.gelu(hidden @ down.T + low) @ up.T + high

    return hook


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        (lambda given: given | {"x": torch.zeros(1)}, MalformedMessage, "auxiliary tensor='x' has no use here"),
        (lambda given: {}, MalformedMessage, "is missing"),
        (lambda given: {name: tensor.half() for name, tensor in given.items()}, MalformedMessage, "is torch.float16"),
        (lambda given: {name: tensor * math.inf for name, tensor in given.items()}, OffsiteError, "nan|inf|NaN"),
        (lambda given: {name: tensor * 1e6 for name, tensor in given.items()}, UnsupportedModel, "vetting given_peak"),
        (lambda given: given | {"x": torch.zeros(2**22)}, RangeError, "at most .* are taken, .* do not train"),
    ],
)
def test_a_site_trains_on_nothing_but_what_its_job_takes(
    madx: World, change: Any, kind: type[Exception], reason: str, tmp_path: Path
) -> None:
    """The coordinator announces another file honestly, and signs a job for that file."""
    folder = tmp_path / "package"
    shutil.copytree(madx.run.store.package, folder)
    facts = package_reader.read_manifest(folder)
    content = save(change(auxiliary_file.read(folder, facts)))
    (folder / GIVEN).write_bytes(content)
    files = facts.files | {GIVEN: FileEntry(hashlib.sha256(content).hexdigest(), len(content))}
    lied = dataclasses.replace(facts, files=files)
    (folder / "manifest.json").write_bytes(lied.to_bytes())
    with pytest.raises(kind, match=reason) as caught:
        open_session(folder, madx.manifest, emulator=lied.digest(), limits=VettingThresholds(), seed=1)
    assert "\n" not in str(caught.value)


def test_a_site_vets_frozen_adapters_where_they_stand(madx: World) -> None:
    session = open_session(
        madx.run.store.package,
        madx.manifest,
        emulator=madx.manifest.emulator,
        limits=VettingThresholds(),
        seed=1,
        weights="stored",
    )
    kinds = [{check.name for check in vetting.checks} for vetting in session.vetting]
    assert len(kinds) == 3
    assert "given_peak" in kinds[0]
    assert {"growth", "least_change"} & kinds[2]
    madx.session.put(madx.session.start)  # a round may have trained on it
    assert torch.equal(outputs(session.model), outputs(madx.session.model))


def test_two_adapters_are_fused(fed: Path, languages: list[Path], tmp_path: Path) -> None:
    names = ", ".join(f'"{folder}"' for folder in languages)
    world = make_world(written(fed, "fusion", f'method = "fusion"\nrank = 2\nfrozen = [{names}]'), tmp_path / "w")
    adapter = one_round(world, tmp_path / "sites")
    folder = exported(world, adapter, tmp_path / "a")
    tuned = load(plain(world), folder)
    job = job_of(world)
    plug(job.full, job.layout, adapter)
    assert torch.equal(outputs(tuned), outputs(job.full))
    plug(job.full, job.layout, world.start)
    assert (outputs(tuned) - outputs(job.full)).abs().max() > 1e-5
    shipped = DeployedEmulator.open(world.run.store.package, job)  # as a refresh opens it
    assert {name for name, p in shipped.model.named_parameters() if p.requires_grad} == set(job.layout.names)


@pytest.mark.parametrize(
    ("adapter", "kind", "reason"),
    [
        (
            'method = "lora"\nfrozen = ["{a}"]',
            ConfigError,
            "'lora' takes no frozen adapter; remove the key, or take madx or fusion$",
        ),
        ('method = "madx"', ConfigError, "^adapter.frozen=0 folders: method 'madx' takes 1"),
        ('method = "madx"\nfrozen = ["{a}", "{b}"]', ConfigError, "^adapter.frozen=2 folders: .*'madx' takes 1"),
        ('method = "fusion"\nfrozen = ["{a}"]', ConfigError, "^adapter.frozen=1 folders: .*'fusion' takes 2"),
        ('method = "madx"\nfrozen = ["nowhere"]', DataError, "^adapter.frozen='.*/nowhere': no such folder"),
        ('method = "madx"\nfrozen = ["model"]', DataError, "^adapter.adapter=.*has no adapter_config.json"),
        ('method = "madx"\nfrozen = "{a}"', ConfigError, "adapter.frozen='.*': must be a list"),
        ('method = "masked"\noptions = {{ by = "data" }}', ConfigError, "takes one of magnitude, fisher"),
        (
            'method = "ip_adapter"',
            ConfigError,
            "only method 'ip_adapter' reads all that records of 'image_prompt_to_image' hold, .*; take both or "
            "neither$",
        ),
    ],
)
def test_a_wrong_federation_file_is_refused_in_a_line(
    fed: Path, languages: list[Path], adapter: str, kind: type[Exception], reason: str, tmp_path: Path
) -> None:
    path = written(fed, "wrong", adapter.format(a=languages[0], b=languages[1]))

    def prepare() -> None:
        settings, sha256 = read_config(path)
        Run.create(settings, sha256, tmp_path / "run").open_job()

    with pytest.raises(kind, match=reason) as caught:
        prepare()
    assert "\n" not in str(caught.value)


def test_adapters_of_other_slots_or_another_model_are_refused(fed: Path, languages: list[Path], tmp_path: Path) -> None:
    path = written(fed, "madx_wrong", f'method = "madx"\nfrozen = ["{languages[0]}"]')
    path.write_text(path.read_text().replace("first = 1", "first = 2"))
    assert "slots are model.layers.0, model.layers.5, must be the new" in refused(path, tmp_path / "slots")
    narrow = tmp_path / "narrow"
    stored = load_file(languages[0] / "adapter_model.safetensors")
    narrow.mkdir()
    (narrow / "adapter_config.json").write_bytes((languages[0] / "adapter_config.json").read_bytes())
    save_file(
        {n: t[:, :16].clone() if "down.weight" in n else t for n, t in stored.items()},
        narrow / "adapter_model.safetensors",
    )
    path = written(fed, "madx_narrow", f'method = "madx"\nfrozen = ["{narrow}"]')
    assert "(3, 16), must be torch.float32 (3, 32)" in refused(path, tmp_path / "narrow_run")


def refused(path: Path, run: Path) -> str:
    settings, sha256 = read_config(path)
    check_frozen(settings)
    with pytest.raises(ConfigError) as caught:
        Run.create(settings, sha256, run).open_job()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_mask_without_public_data_is_refused(fed: Path, tmp_path: Path) -> None:
    settings, sha256 = read_config(written(fed, "fisher_none", FISHER))
    (tmp_path / "public.txt").write_text(" ".join(["w1 w2"] * 20))
    settings = dataclasses.replace(
        settings, data=dataclasses.replace(settings.data, public=str(tmp_path / "public.txt"))
    )
    with pytest.raises(OffsiteError, match=r"public records=\d: at least 32 are needed; give more public data"):
        Run.create(settings, sha256, tmp_path / "run").open_job()


def test_folders_are_relative_to_the_file(fed: Path) -> None:
    settings, _ = read_config(written(fed, "relative", 'method = "madx"\nfrozen = ["earlier/adapter"]'))
    assert settings.adapter.frozen == (str(fed.parent / "earlier" / "adapter"),)


def test_a_mask_from_compressed_weights_is_refused(fed: Path) -> None:
    """In a parallel emulator, other entries are the largest, in equal number, so that no site would notice."""
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    coarse = (weight / weight.abs().max() * 7).round()
    assert not torch.equal(largest(weight, 100), largest(coarse, 100))
    path = written(fed, "parallel", 'method = "masked"')
    parallel = path.read_text().replace("first = 1\nlast = 1", 'shape = "parallel"')
    path.write_text(parallel)
    with pytest.raises(ConfigError, match=r"by='magnitude'.*take by = 'fisher'"):
        check_mask(read_config(path)[0])
    check_mask(read_config(written(fed, "sandwich", 'method = "masked"'))[0])
    path.write_text(parallel.replace('method = "masked"', FISHER))
    check_mask(read_config(path)[0])
