"""Everyday commands load no heavy module: nobody waits for a model library to read a status."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from offsite.cli.main import app
from offsite.client.home.installation import SiteHome
from offsite.client.home.jobs import Jobs
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.coordinator.home.status import Status
from offsite.protos.signed_job import sign_job
from offsite.trust.chain import Chain
from offsite.trust.welcome import Welcome
from tests.cli.test_check import FED, FILES, plant, write
from tests.protos.test_manifest import JOB
from tests.task_samples import first_of

MODELS = ("torch", "transformers", "peft", "opacus", "diffusers", "bitsandbytes")
HEAVY = (*MODELS, "dp_accounting", "scipy", "flwr", "grpc", "ray", "matplotlib", "pyarrow", "pandas")
SITES = ("east", "north", "south", "west")

# COMMAND -> its exit code in this test, and the modules that it may not load.
TABLE: dict[str, tuple[int, tuple[str, ...]]] = {
    "--help": (0, (*HEAVY, "numpy")),
    "--version": (0, (*HEAVY, "numpy")),
    "init {new}.toml": (0, HEAVY),
    "simulate --help": (0, HEAVY),
    "coordinator --help": (0, HEAVY),
    "coordinator init {new}": (0, HEAVY),
    "coordinator approve {home} {folder}/fresh/site.request --yes": (0, HEAVY),
    "coordinator approve {home} --yes": (0, HEAVY),
    "coordinator revoke {home} south --yes": (0, HEAVY),
    "coordinator run --help": (0, HEAVY),
    "coordinator status {home}": (0, HEAVY),
    "coordinator status {new}": (2, HEAVY),
    "client --help": (0, HEAVY),
    "client init {new} --name new --data {folder}/text.csv": (0, HEAVY),
    "client request {site}": (0, HEAVY),
    "client sign {site} {home}/welcomes/east.welcome --fingerprint {fingerprint}": (0, HEAVY),
    "client sign {site} {home}/welcomes/east.welcome --fingerprint 0000": (2, HEAVY),
    "client rotate {folder}/north": (0, HEAVY),
    "client leave {folder}/west --yes": (0, HEAVY),
    "client run {new}": (2, HEAVY),
    "client inspect {site}": (0, HEAVY),
    "client inspect {site} {job}": (0, HEAVY),
    "client inspect {site} {job} --json": (0, HEAVY),
    "client approve {site} {job}": (0, (*MODELS, "flwr", "grpc", "ray", "matplotlib", "pyarrow", "pandas")),
    "client approve {site}": (0, (*MODELS, "flwr", "grpc", "ray", "matplotlib", "pyarrow", "pandas")),
    "client withdraw {site} {job}": (0, (*MODELS, "flwr", "grpc", "ray", "matplotlib", "pyarrow", "pandas")),
    "client audit verify {site}": (0, HEAVY),
    "client doctor {site}": (1, HEAVY),  # no coordinator runs here
    "plan --help": (0, HEAVY),
    "plan": (2, HEAVY),  # no model
    "check {folder}/planted/fed.toml": (2, HEAVY),  # ten faults, none of them in the model
}
PERMITTED = {"models": '["any"]', "methods": '["any"]', "splits": '["any"]', "epsilon_cap": "100.0"}
PROBE = """
import json, sys
from offsite.cli.main import main

try:
    main()
finally:
    print("LOADED", json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@dataclass(frozen=True)
class Place:
    """A federation of four sites and a fifth that was not admitted; the first has been offered a job."""

    folder: Path
    new: Path

    def words(self, command: str) -> list[str]:
        """Returns a row of the table as arguments."""
        home = self.folder / "home"
        known = {"folder": self.folder, "home": home, "site": self.folder / "east", "new": self.new}
        welcome = Welcome.from_bytes((home / "welcomes" / "east.welcome").read_bytes())
        return command.format(**known, job=JOB.digest().hex(), fingerprint=welcome.fingerprint).split()

    def run(self, command: str) -> tuple[int, str, set[str]]:
        """Runs a row of the table as a process; returns exit code, output, and the modules loaded at the end."""
        done = subprocess.run(
            [sys.executable, "-c", PROBE, *self.words(command)],
            capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        loaded = re.search(r"^LOADED (.*)$", done.stdout, re.MULTILINE)
        assert loaded is not None, done.stdout + done.stderr
        return done.returncode, done.stdout + done.stderr, set(json.loads(loaded[1]))


def offsite(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def _planted(world: Path) -> None:
    """Makes a federation with ten faults in its files, and none in its model."""
    sample = first_of("sequence_classification")
    sample.save(world / "model")
    for seed, name in enumerate(FILES):
        write(world / f"{name}.jsonl", sample.records(34, seed))
    rows = sample.records(34, 40)
    (world / "birch.csv").write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    (world / "fed.toml").write_text(FED)
    plant(world)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("light")
    (folder / "text.csv").write_text("text\n" + "some words\n" * 120)
    _planted(folder / "planted")
    home, now = folder / "home", datetime.now(UTC)
    offsite("coordinator", "init", home)
    for name in (*SITES, "fresh"):
        offsite("client", "init", folder / name, "--name", name, "--data", folder / "text.csv")
    said = offsite("coordinator", "approve", home, *(folder / name / "site.request" for name in SITES), "--yes")
    fingerprint = re.search(r"to compare: (\S+)", said)
    assert fingerprint is not None
    for name in SITES:
        welcome = home / "welcomes" / f"{name}.welcome"
        offsite("client", "sign", folder / name, welcome, "--fingerprint", fingerprint[1])
    Status(home / "status.json", lambda: now).set("finished", round=1)
    site, data = SiteHome.open(folder / "east"), JOB.to_bytes()
    for key, value in PERMITTED.items():
        text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", site.policy.read_text())
        assert count == 1, key
        site.policy.write_text(text)
    jobs, digest = Jobs(site.state / "jobs"), JOB.digest().hex()
    jobs.keep(data, sign_job(CoordinatorHome.open(home).identity, data), digest)
    jobs.show(digest, now=now)
    jobs.approve(digest, by="owner", now=now)
    spent = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 3, "delta": site.read_policy().delta_cap}
    entry = {"job": "ab", "round": 1, **spent, "epsilon_total": 1.25, "epsilon_committed": 1.5}
    for name in ("east", "south"):
        ledger = SiteHome.open(folder / name).state / "ledger-main.jsonl"
        Chain(ledger, "offsite privacy ledger main").append("spend", entry, now=now)
    return folder


@pytest.fixture
def place(folder: Path, tmp_path: Path) -> Place:
    return Place(folder, tmp_path / "new")


@pytest.mark.parametrize("command", TABLE)
def test_a_command_loads_only_what_it_needs(command: str, place: Place) -> None:
    expected, forbidden = TABLE[command]
    code, output, loaded = place.run(command)
    assert code == expected, output
    assert sorted(loaded.intersection(forbidden)) == []


def test_the_epsilon_of_a_ledger_with_entries_is_shown_as_recorded(place: Place) -> None:
    said = place.run("client audit verify {folder}/south")[1]
    assert "ledger of 'main': 1 entries, epsilon 1.2500 spent and 1.5000 with what is set aside, at delta 1e-06" in said


def test_what_a_command_loads_is_seen_also_where_it_fails(place: Place) -> None:
    """A dry run needs every library, and ends with an error, since the job's package is not here."""
    code, output, loaded = place.run("client dry-run {site} {job}")
    assert code == 2, output
    assert "its package is not here yet" in output
    assert loaded.issuperset(("torch", "transformers", "peft"))


def test_a_doctor_of_a_parquet_file_loads_its_reader_and_no_model_library(place: Place) -> None:
    import pyarrow
    import pyarrow.parquet

    data = place.new.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), data)
    offsite("client", "init", place.new, "--name", "new", "--data", data)
    _, output, loaded = place.run("client doctor {new}")
    assert "2 records, for the tasks causal_lm" in output
    assert "pyarrow" in loaded
    assert sorted(loaded.intersection(MODELS)) == []
