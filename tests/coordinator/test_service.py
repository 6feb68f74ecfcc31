"""A job at a coordinator: the settings of its run folder, its end without sites, and its lost links."""

import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import pytest

from offsite.cli import main as command
from offsite.coordinator import service
from offsite.coordinator.aggregation.rules import ServerState
from offsite.coordinator.config.federation_file import FedConfig, read_config
from offsite.coordinator.home.job_settings import run_folder, settings_sha256
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.coordinator.home.status import Status, read_status
from offsite.coordinator.job.prepare import Job
from offsite.coordinator.job.round_record import RoundRecord
from offsite.coordinator.job.store import Progress, Store
from offsite.coordinator.network.package_delivery import Delivery
from offsite.coordinator.report.concluded import concluded
from offsite.coordinator.report.federation_outcome import Started, conclude
from offsite.coordinator.rounds.attempt import Attempts
from offsite.coordinator.rounds.counter import MonotonicCounter
from offsite.coordinator.rounds.round_loop import TrainingLoop
from offsite.coordinator.service import JobContext, open_job, run_job
from offsite.errors import ConfigError, DataError, TooFewSurvivors, Untrusted
from offsite.trust.files import sha256_file
from offsite.trust.keys import SiteKeys
from offsite.trust.request import write_request

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
SITES = ("ash", "birch", "cedar")
STARTED = Started("0f" * 32, "2026-11-24T12:00:00+00:00")
DELIVERIES = dict.fromkeys(SITES, Delivery(bytes(32), 1, {}))
HOME = '[coordinator]\nhome = "home"\npatience = 0.1\n'


@pytest.fixture(scope="module")
def folder(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation file of a real federation beside the tiny world's model and texts, and a home with three sites."""
    made = tmp_path_factory.mktemp("desk")
    for name in ("model", "data"):
        (made / name).symlink_to(fed.parent / name)
    (made / "fed.toml").write_text(re.sub(r"(?m)^(sites_dir|owners) = .*\n", "", fed.read_text()) + HOME)
    terms = {"name": "demo", "host": "127.0.0.1", "link_port": 1, "depot_port": 2}  # ports that nothing may listen on
    home = CoordinatorHome.create(made / "home", **terms, n_min=3, max_epsilon=8.0, now=NOW, suite=1)  # type: ignore[arg-type]
    home.approve([write_request(SiteKeys.create(made / site, 1), site, now=NOW) for site in SITES], NOW)
    return made


@pytest.fixture(scope="module")
def job(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """The prepared job and its run folder, which no test writes to."""
    run = tmp_path_factory.mktemp("prepared") / "run"
    opened = context(folder, run)
    return open_job(opened, opened.home.federation()), run


@pytest.fixture
def run(job: tuple[Job, Path], tmp_path: Path) -> Path:
    """A copy of the prepared run folder."""
    shutil.copytree(job[1], tmp_path / "run")
    return tmp_path / "run"


def context(folder: Path, run: Path, config: FedConfig | None = None) -> JobContext:
    config, home = config or read_config(folder / "fed.toml")[0], CoordinatorHome.open(folder / "home")
    return JobContext(
        home=home,
        config=config,
        store=Store(run),
        status=Status(run / "status.json", lambda: NOW),
        nonce=lambda: bytes(32),
        now=lambda: NOW,
        on_step=lambda text: None,
        on_round=lambda record: None,
    )


def edited(folder: Path, **replaced: str) -> FedConfig:
    """The configuration after an edit of the file: each key's line gets another value, or is added below the table."""
    text = (folder / "fed.toml").read_text()
    for key, value in replaced.items():
        text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        text += "" if count else f"{key} = {value}\n"
    path = folder / "edited.toml"
    path.write_text("# another comment\n" + text)
    return read_config(path)[0]


def all_rounds(job: Job, store: Store) -> Progress:
    """Leaves a run folder as a kill does right after its last whole round."""
    for number in range(1, job.manifest.rounds + 1):
        progress = Progress(ServerState.start(job.start + np.float32(0.001) * number), number, 1.0)
        store.save(progress, RoundRecord(number, SITES, 3, public_loss=1.0, seconds=1.0))
    return progress


# without the sites


def test_all_rounds_on_disk_are_concluded_without_a_site(
    folder: Path, run: Path, job: tuple[Job, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(run)
    expected = all_rounds(job[0], store)
    (run / "attempt").mkdir()  # of the last round; the kill came before it was closed
    (run / "attempt" / "masked.replies").write_bytes(b"large")
    opened = context(folder, run)
    made, progress = run_job(opened)
    assert progress.round == made.manifest.rounds == expected.round
    assert np.array_equal(progress.server.adapter, expected.server.adapter)
    assert read_status(run / "status.json")["state"] == "finishing"
    started = Started(sha256_file(folder / "fed.toml"), STARTED.at)
    assert concluded(store, started.config_sha256) is None
    report = conclude(opened.config, store, made, progress, started)
    assert report.finished_rounds == made.manifest.rounds
    assert not (run / "attempt").exists()
    assert (store.adapter / "adapter_model.safetensors").is_file()
    assert list((folder / "home" / "link").iterdir()) == []  # no SuperLink was started
    assert not (folder / "home" / "depot").exists()
    # The same command shows what is written, and looks at no model, no record and no package; another file begins anew.
    assert concluded(store, started.config_sha256) == report
    assert concluded(store, STARTED.config_sha256) is None
    (folder / "model").rename(folder / "gone")
    shutil.rmtree(run / "package")
    monkeypatch.setattr("sys.argv", ["offsite", "coordinator", "run", str(folder / "fed.toml"), "--out", str(run)])
    try:
        with pytest.raises(SystemExit) as ended:
            command.main()
    finally:
        (folder / "gone").rename(folder / "model")
    assert ended.value.code == 0, capsys.readouterr().err
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    status = read_status(folder / "home" / "status.json")
    assert (status["state"], status["round"]) == ("finished", made.manifest.rounds)
    (run / "report.html").unlink()
    assert concluded(store, started.config_sha256) is None


def test_it_is_concluded_under_the_next_epoch_too(folder: Path, run: Path, job: tuple[Job, Path]) -> None:
    opened = context(folder, run)
    epoch = replace(opened.home.federation(), epoch=2)
    with pytest.raises(Untrusted, match="epoch=1: this run was made under that epoch, and the owners are at epoch 2"):
        open_job(opened, epoch)
    all_rounds(job[0], opened.store)
    assert open_job(opened, epoch).manifest == job[0].manifest


# what a run folder is tied to


@pytest.mark.parametrize(
    "replaced",
    [{"patience": "7200.0"}, {"attempts": "9"}, {"sites": "3"}, {"patience": "5", "attempts": "1"}, {}],
    ids=str,
)
def test_how_a_job_is_run_may_change_while_it_runs(folder: Path, run: Path, replaced: dict[str, str]) -> None:
    before, after = read_config(folder / "fed.toml")[0], edited(folder, **replaced)
    home = CoordinatorHome.open(folder / "home")
    assert run_folder(home, before, None) == run_folder(home, after, None)
    opened = context(folder, run, after)
    assert open_job(opened, home.federation()).manifest.rounds == 2


@pytest.mark.parametrize(
    "replaced",
    [
        {"rounds": "3"},
        {"seed": "2"},
        {"learning_rate": "0.5"},
        {"gate": "0.2"},
        {"public_examples": "6"},
        {"deadline": "60.0"},
        {"public": '"elsewhere"'},
        {"split": '"truncate"'},
    ],
    ids=str,
)
def test_an_edited_job_does_not_go_on_in_the_folder_of_another(
    folder: Path, run: Path, replaced: dict[str, str]
) -> None:
    before, after = read_config(folder / "fed.toml")[0], edited(folder, **replaced)
    home = CoordinatorHome.open(folder / "home")
    assert run_folder(home, before, None) != run_folder(home, after, None)
    assert run_folder(home, after, run) == run
    opened = replace(context(folder, run), config=after)
    with pytest.raises(ConfigError, match=r"settings=\w{12}: run '.*run' began with \w{12}; restore the federation"):
        open_job(opened, home.federation())


def test_every_setting_but_those_of_running_it_makes_another_job(folder: Path) -> None:
    config = read_config(folder / "fed.toml")[0]
    assert config.coordinator is not None
    free = {("coordinator", name) for name in ("home", "sites", "patience", "attempts")} | {("model", "base")}
    free |= {("compute", "device"), ("compute", "dtype"), ("compute", "offload")}
    free |= {("evaluation", name) for name in ("measures", "generated_records", "new_tokens")}  # of the report alone
    for part in dataclasses.fields(config):
        if not dataclasses.is_dataclass(table := getattr(config, part.name)):
            continue
        for one in dataclasses.fields(table):
            changed = other(getattr(table, one.name))
            if part.name == "coordinator" and one.name == "home":
                continue  # the other places are seen from there
            table_after, after = object.__new__(type(table)), object.__new__(FedConfig)  # unchecked: any value will do
            table_after.__dict__.update(table.__dict__ | {one.name: changed})
            after.__dict__.update(config.__dict__ | {part.name: table_after})
            same = settings_sha256(after) == settings_sha256(config)
            assert same == ((part.name, one.name) in free), f"{part.name}.{one.name}"


def other(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, dict):
        return {**value, "x": 1}
    return ("x",) if isinstance(value, tuple) else f"{value}x"


def test_a_federation_that_is_moved_as_a_whole_stays_the_same_job(folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "moved"
    there.mkdir()
    (there / "fed.toml").write_bytes((folder / "fed.toml").read_bytes())
    here, moved = (read_config(place / "fed.toml")[0] for place in (folder, there))
    assert here.model.path != moved.model.path
    assert settings_sha256(here) == settings_sha256(moved)


def test_a_folder_without_its_settings_is_no_run_folder(folder: Path, run: Path) -> None:
    (run / "settings.json").unlink()
    opened = context(folder, run)
    with pytest.raises(DataError, match=r"no readable settings\.json"):
        open_job(opened, opened.home.federation())


# a link that is lost


def losing(opened: JobContext, job: Job, rounds: list[int]) -> Callable[..., Progress]:
    """Links that are lost one after the other, each when the job has the given number of whole rounds."""
    left = iter(rounds)

    def over_link(*_: object) -> Progress:
        number = next(left, None)
        progress = Progress(ServerState.start(job.start), job.manifest.rounds if number is None else number, 1.0)
        opened.store.save_state(progress)
        if number is None:
            return progress
        request = httpx.Request("POST", "https://127.0.0.1/v1/runtime/get-nodes")
        raise httpx.HTTPStatusError("no", request=request, response=httpx.Response(401, request=request))

    return over_link


def test_links_may_be_lost_for_ever_while_there_are_whole_rounds_between(
    folder: Path, run: Path, job: tuple[Job, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, epoch = context(folder, run), CoordinatorHome.open(folder / "home").federation()
    lost = [0] * 4 + [1] * 4
    assert job[0].manifest.rounds == 2
    monkeypatch.setattr(service, "_over_link", losing(opened, job[0], lost))
    assert service._over_links(opened, job[0], epoch, DELIVERIES).round == job[0].manifest.rounds


def test_a_link_that_is_lost_again_and_again_ends_the_job_in_one_line(
    folder: Path, run: Path, job: tuple[Job, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, epoch = context(folder, run), CoordinatorHome.open(folder / "home").federation()
    monkeypatch.setattr(service, "_over_link", losing(opened, job[0], [0] * 2 + [1] * 6))
    with pytest.raises(DataError) as caught:
        service._over_links(opened, job[0], epoch, DELIVERIES)
    assert str(caught.value) == (
        "link: Flower's SuperLink was lost 5 times without a whole round (it ended our run; was this machine asleep "
        f"for a minute); see {opened.home.link / 'superlink.log'}, then run again"
    )
    assert read_status(run / "status.json")["state"] == "link lost"


def test_a_link_that_is_lost_in_the_farewell_is_not_missed(
    folder: Path, run: Path, job: tuple[Job, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rounds are whole, so that the job waits for no site."""
    opened, epoch = context(folder, run), CoordinatorHome.open(folder / "home").federation()
    monkeypatch.setattr(service, "_over_link", losing(opened, job[0], [2, 0]))
    assert service._over_links(opened, job[0], epoch, DELIVERIES).round == job[0].manifest.rounds


# an end without a sum


class Line:
    """An exchange on which nobody answers."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def send(self, stage: str, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        self.stages.append(stage)
        return {}


def test_an_abort_is_told_on_the_short_line_once(folder: Path, run: Path, job: tuple[Job, Path]) -> None:
    opened, slow, short = context(folder, run), Line(), Line()
    attempts = Attempts(run, lambda: bytes(32), MonotonicCounter(run / "aggregations.txt"))
    federation = TrainingLoop(job[0], opened.config, opened.store, attempts, tries=2)
    with pytest.raises(TooFewSurvivors, match="sites=0 after train"):
        federation.run(slow, lambda one: None, None, short)
    assert slow.stages == ["train", "train"]
    assert short.stages == ["abort", "abort"]
