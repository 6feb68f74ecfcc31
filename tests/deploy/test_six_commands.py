"""README's six commands, in the script that its readers run: real processes, and the adapter of the memory engine."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from offsite.client.home.policy import Policy
from tests.conftest import sentence
from tests.faults.conftest import wait_for
from tests.forked import offsite
from tests.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "federation.sh"
SITES = ("ash", "birch", "cedar")
COMMANDS = ["coordinator init", "client init", "coordinator approve", "client sign", "client run", "coordinator run"]
SECONDS = 600.0


def lines_of(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields a federation file's keys in the script's form, one dotted line each."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from lines_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {json.dumps(value)}"


def job_of(fed: Path, **replaced: object) -> str:
    """Returns the lines of a federation file of the tiny world without its places and sites."""
    table = tomllib.loads(fed.read_text())
    del table["model"]
    table["data"] = {"length": table["data"]["length"]}
    table["training"]["rounds"] = 1
    table["coordinator"] = {"patience": 300.0, "deadline": 300.0}
    return "\n".join(lines_of({**table, **replaced})) + "\n"


def policy(**values: str) -> str:
    text = Policy.template()
    for key, value in values.items():
        text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        assert count == 1, key
    return text


class Script:
    """A run of the script in a session of its own, which ends whatever the test does."""

    def __init__(self, folder: Path, world: Path, sites: Path, **environment: str) -> None:
        assert shutil.which("bash"), "the script needs bash"
        self.folder, ports = folder, free_ports(2)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "OMP_NUM_THREADS": "1", "LINK_PORT": str(ports[0]), "DEPOT_PORT": str(ports[1])}
        self.log = folder.with_name(f"{folder.name}.log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(SCRIPT), str(folder), str(world / "model"), str(world / "data" / "public"), str(sites)],
                env=os.environ | own | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.left():
            process.kill()
        self.process.wait()

    def left(self) -> list[psutil.Process]:
        """Returns the processes of the script's session that still run."""
        alive = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return alive

    def said(self) -> str:
        logs = [self.log, *sorted(self.folder.glob("*.log"))]
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')}" for path in logs)

    def finish(self) -> None:
        assert self.process.wait(timeout=SECONDS) == 0, self.said()
        self.leaves_nothing()

    def leaves_nothing(self) -> None:
        """Waits until nothing of the session runs: Linux ends Flower's programs just after their parents."""
        wait_for(lambda: not self.left(), SECONDS)


def test_the_script_types_the_six_commands_and_no_other() -> None:
    typed = re.findall(r"(?m)^\s*offsite (\w+ \w+)", SCRIPT.read_text())
    assert typed == COMMANDS
    assert not re.search(r"--yes|\|\s*offsite|\$\(offsite|&&\s*offsite|;\s*offsite", SCRIPT.read_text())


def test_the_readme_shows_the_same_six() -> None:
    section = (ROOT / "README.md").read_text().split("## Between organisations")[1].split("```")[1]
    assert re.findall(r"(?m)^offsite (\w+ \w+)", section) == COMMANDS


@pytest.mark.slow
def test_same_bytes_as_the_memory_engine(fed: Path, tmp_path: Path) -> None:
    (tmp_path / "job").write_text(job_of(fed))
    permitted = policy(
        models='["any"]',
        methods='["any"]',
        splits='["blocks"]',
        approval='"automatic"',
        allow_seeded_noise="true",
    )
    (tmp_path / "policy").write_text(permitted)
    given = {"JOB": str(tmp_path / "job"), "POLICY": str(tmp_path / "policy"), "SIMULATION_SEED": "1"}
    with Script(tmp_path / "fed", fed.parent, fed.parent / "data" / "sites", **given) as script:
        script.finish()
    offsite("simulate", str(fed), "--sites", "3", "--rounds", "1", "--out", str(tmp_path / "memory"), plain=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        expected = (tmp_path / "memory" / "adapter" / name).read_bytes()
        assert (tmp_path / "fed" / "run" / "adapter" / name).read_bytes() == expected, name
    for name in ("report.html", "report.md", "report.json", "privacy.json"):
        assert (tmp_path / "fed" / "run" / name).stat().st_size > 0, name
    for site in SITES:
        assert (tmp_path / "fed" / site / "policy.toml").read_text() == permitted
        ledger = (tmp_path / "fed" / site / "state" / "ledger-main.jsonl").read_text().splitlines()
        assert [json.loads(entry)["kind"] for entry in ledger] == ["reserve", "spend", "close"]


@pytest.mark.slow
def test_without_switches_the_job_waits_for_each_owner(fed: Path, tmp_path: Path) -> None:
    """The way of a reader: policies from the template, noise from the system, three approvals by hash."""
    for site in SITES:
        (tmp_path / "sites").mkdir(exist_ok=True)
        (tmp_path / "sites" / f"{site}.txt").write_text(sentence(site, 16000))
    (tmp_path / "job").write_text(job_of(fed))
    with Script(tmp_path / "fed", fed.parent, tmp_path / "sites", JOB=str(tmp_path / "job")) as script:
        home = tmp_path / "fed" / "home"

        def asked() -> bool:
            assert script.process.poll() is None, script.said()
            path = home / "status.json"
            sites = json.loads(path.read_text())["sites"] if path.exists() else {}
            return len(sites) == 3 and all("not approved" in one["detail"] for one in sites.values())

        wait_for(asked, SECONDS, every=0.5)
        for site in SITES:
            folder = str(tmp_path / "fed" / site)
            job = offsite("client", "inspect", folder, plain=True).split()[0]
            shown = offsite("client", "inspect", folder, job, plain=True)
            assert "epsilon 8.0 at delta 1e-06" in shown
            assert f"offsite client approve {folder} {job}\n" in shown
            if site == SITES[0]:  # by the printed command, and taken back; then as the page says
                offsite("client", "approve", folder, job, plain=True)
                assert f"withdrawn: {job}" in offsite("client", "withdraw", folder, job[:12], plain=True)
            assert f"approved {job} until" in offsite("client", "approve", folder, plain=True)
        script.finish()
    assert (tmp_path / "fed" / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert "simulation_seed" not in tomllib.loads((tmp_path / "fed" / "ash" / "site.toml").read_text())


@pytest.mark.slow
def test_a_site_that_ends_ends_the_script(fed: Path, tmp_path: Path) -> None:
    (tmp_path / "job").write_text(job_of(fed))
    (tmp_path / "policy").write_text(policy(approval='"sometimes"'))
    given = {"JOB": str(tmp_path / "job"), "POLICY": str(tmp_path / "policy")}
    with Script(tmp_path / "fed", fed.parent, fed.parent / "data" / "sites", **given) as script:
        assert script.process.wait(timeout=SECONDS) == 1, script.said()
        assert "approval='sometimes'" in script.said()
        script.leaves_nothing()


@pytest.mark.slow
def test_a_stopped_script_leaves_nothing_running(fed: Path, tmp_path: Path) -> None:
    (tmp_path / "job").write_text(job_of(fed))
    with Script(tmp_path / "fed", fed.parent, fed.parent / "data" / "sites", JOB=str(tmp_path / "job")) as script:
        wait_for((tmp_path / "fed" / "home" / "status.json").exists, SECONDS, every=0.2)
        script.process.send_signal(signal.SIGTERM)
        assert script.process.wait(timeout=SECONDS) == 143
        script.leaves_nothing()
