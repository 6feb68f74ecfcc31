"""A real federation on loopback: one coordinator and three sites as processes, over Flower and TLS."""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forked import PROGRAM, Process, launch, offsite
from tests.ports import free_ports

SITES = ("ash", "birch", "cedar")
SEED, BLOCKS = 1, 100  # BLOCKS: of every site's texts in the tiny world
POLICY = {
    "models": '["any"]',
    "methods": '["any"]',
    "splits": '["blocks"]',
    "approval": '"automatic"',
    "min_records": "10",
    "epsilon_cap": "1000.0",
    "allow_variants": "true",
    "allow_seeded_noise": "true",
}


def wait_for(what: Callable[[], Any], seconds: float = 400.0, every: float = 0.02) -> Any:
    """Returns the first true value; fails when none came in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := what():
            return found
        time.sleep(every)
    pytest.fail(f"did not happen within {seconds} s")


def preloaded(source: str, folder: Path) -> str:
    """Builds a library of this folder that a process loads before the C library, and returns its path."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip(f"no C compiler here to build {source} with")
    library, code = folder / Path(source).with_suffix(".so"), Path(__file__).with_name(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, code, "-ldl"], check=True)
    return str(library)


class Federation:
    """The folders and the processes of one federation.

    Args:
      folder: folder for all files of the federation.
      fed: federation file of the tiny world, with its model and texts.
      ports: ports (link, depot) of the coordinator.
      sites: names of the sites.
      told: ports (link, depot) in the welcomes, where a proxy stands between.
      host: address on which the coordinator listens, and which its sites reach.
      plain: whether every process is a new interpreter, instead of a fork of a process that has imported everything.
    """

    def __init__(
        self,
        folder: Path,
        fed: Path,
        *,
        sites: tuple[str, ...] = SITES,
        told: tuple[int, int] | None = None,
        ports: list[int] | None = None,
        suite: int = 2,
        host: str = "127.0.0.1",
        plain: bool = False,
    ) -> None:
        self.folder, self.world, self.home, self.sites = folder, fed.parent, folder / "home", sites
        self.fed_text, self.plain = fed.read_text(), plain
        self.ports = ports or free_ports(2)
        self.processes: dict[str, Process] = {}
        link, depot = told or self.ports
        ports = ("--link-port", str(link), "--depot-port", str(depot), "--suite", str(suite))
        self.command("coordinator", "init", str(self.home), "--name", "faults", "--host", host, *ports)
        for site in sites:
            data = self.world / "data" / "sites" / site / "train"
            place = str(self.site(site))
            self.command("client", "init", place, "--name", site, "--data", str(data), "--suite", str(suite))
        requests = [str(self.site(site) / "site.request") for site in sites]
        printed = self.command("coordinator", "approve", str(self.home), *requests, "--yes")
        fingerprint = re.search(r"to compare: (\S+)", printed)
        assert fingerprint is not None, printed
        if told is not None:  # only now, since a welcome names the ports of these settings
            settings = self.home / "coordinator.toml"
            for key, port in zip(("link_port", "depot_port"), self.ports, strict=True):
                settings.write_text(re.sub(rf"(?m)^{key} = .*$", f"{key} = {port}", settings.read_text()))
        for site in sites:
            welcome = str(self.home / "welcomes" / f"{site}.welcome")
            self.command("client", "sign", str(self.site(site)), welcome, "--fingerprint", fingerprint[1])
            self.set_policy(site, **POLICY)
            with (self.site(site) / "site.toml").open("a") as file:
                file.write(f"simulation_seed = {SEED}\n")
            self.set_settings(site, blocks=str(BLOCKS))

    def command(self, *arguments: str) -> str:
        return offsite(*arguments, plain=self.plain)

    def site(self, name: str) -> Path:
        return self.folder / name

    def set_policy(self, site: str, **values: str) -> None:
        self._set(self.site(site) / "policy.toml", values)

    def set_settings(self, site: str, **values: str) -> None:
        self._set(self.site(site) / "site.toml", values)

    def _set(self, path: Path, values: dict[str, str]) -> None:
        text = path.read_text()
        for key, value in values.items():
            text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
            assert count == 1, key
        path.write_text(text)

    def job(self, name: str, *, rounds: int = 2, coordinator: str = "", training: str = "", **replaced: str) -> Path:
        """Writes a federation file; jobs of different names are different jobs."""
        text = re.sub(r"(?m)^(sites_dir|owners) = .*\n", "", self.fed_text)
        text = text.replace('path = "model"', f'path = "{self.world / "model"}"')
        text = text.replace('public = "data/public"', f'public = "{self.world / "data" / "public"}"')
        text = re.sub(r"(?m)^rounds = .*$", f"rounds = {rounds}\n{training}", text)
        for key, value in replaced.items():
            text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
            assert count == 1, key
        text += f'\n[coordinator]\nhome = "{self.home}"\npatience = 60.0\ndeadline = 60.0\n{coordinator}\n'
        path = self.folder / f"{name}.toml"
        path.write_text(f"# {name}\n{text}")
        return path

    def forget_updates(self) -> None:
        """Lets the sites send an update of an earlier test again.

        With noise from a seed every job repeats the same update, which a site's journal rightly refuses to send twice.
        """
        for site in self.sites:
            (self.site(site) / "state" / "journal.jsonl").unlink(missing_ok=True)

    def start(self, name: str, *arguments: str, module: str = PROGRAM, env: dict[str, str] | None = None) -> Process:
        """Starts a process with its output in NAME.log; a process with an environment of its own is not a fork."""
        with (self.folder / f"{name}.log").open("ab") as log:
            plain = self.plain or env is not None
            process = launch(module, *arguments, output=log, errors=log, env=env, plain=plain)
        self.processes[name] = process
        return process

    def start_site(self, name: str, *, env: dict[str, str] | None = None) -> Process:
        return self.start(name, "client", "run", str(self.site(name)), env=env)

    def start_sites(self) -> None:
        for site in self.sites:
            if site not in self.processes or self.processes[site].poll() is not None:
                self.start_site(site)

    def start_coordinator(self, job: Path, *, env: dict[str, str] | None = None) -> Process:
        return self.start("coordinator", "coordinator", "run", str(job), "--out", str(self.run(job)), env=env)

    def run(self, job: Path) -> Path:
        return self.folder / f"run-{job.stem}"

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.home / "status.json").read_text())
        except (OSError, ValueError):
            return {"state": "absent", "stage": "", "round": 0, "sites": {}}
        return found

    def wait_stage(self, stage: str, *, pid: int, seconds: float = 400.0) -> None:
        """Waits until this coordinator awaits a stage."""

        def there() -> bool:
            status = self.status()
            ended = self.processes["coordinator"].poll() is not None
            assert not ended, self.log("coordinator")
            return bool(status.get("pid") == pid and status.get("stage") == stage and status.get("awaited"))

        wait_for(there, seconds)

    def finish(self, seconds: float = 600.0) -> int:
        """Waits for the coordinator's end and returns its exit code."""
        return self.processes["coordinator"].wait(timeout=seconds)

    def audit(self, site: str, kind: str) -> list[dict[str, Any]]:
        path = self.site(site) / "state" / "audit.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line["fields"] for line in lines if line["kind"] == kind]

    def ledger(self, site: str) -> list[dict[str, Any]]:
        """Returns the releases in a site's ledger, without what was set aside for jobs."""
        return [entry for entry in self.ledger_entries(site) if entry["kind"] == "spend"]

    def ledger_entries(self, site: str) -> list[dict[str, Any]]:
        path = self.site(site) / "state" / "ledger-main.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def adapter(self, job: Path) -> bytes:
        return (self.run(job) / "adapter" / "adapter_model.safetensors").read_bytes()

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        process = self.processes[name]
        process.send_signal(number)
        process.wait(timeout=30)

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def federation(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three sites that run for a whole module; a test that kills a site starts it again."""
    made = Federation(tmp_path_factory.mktemp("federation"), fed)
    made.start_sites()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def undisturbed(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], bytes]:
    """Gives the adapter of the memory engine with the same three sites, seeds and number of rounds."""
    known: dict[int, bytes] = {}

    def adapter(rounds: int) -> bytes:
        if rounds not in known:
            out = tmp_path_factory.mktemp("memory") / "run"
            offsite("simulate", str(fed), "--sites", "3", "--rounds", str(rounds), "--out", str(out))
            known[rounds] = (out / "adapter" / "adapter_model.safetensors").read_bytes()
        return known[rounds]

    return adapter
